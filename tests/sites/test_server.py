"""The meeting place's door: strangers stay out, and whatever comes in, it goes on answering."""

from __future__ import annotations

import random
import re
import socket
import threading
from pathlib import Path

import pytest
import torch
from meeting import Meeting, meeting

import samestep
from samestep.errors import MismatchError, NonFiniteError, PeerError, SettingsError
from samestep.sites import proof
from samestep.sites.errand import Errand
from samestep.sites.proof import read_secret
from samestep.sites.recipe import Sites
from samestep.sites.visitor import Unreachable, Visitor, address_of
from samestep.storage import wire

SECRET = b"0123456789abcdef"
EMPTY = torch.empty(0, dtype=torch.uint8)
WEIGHTS = [torch.arange(6.0).reshape(2, 3)]


def visitor(place: Meeting, secret: bytes = SECRET) -> Visitor:
    return Visitor("127.0.0.1", place.port, secret)


def terms(**settings) -> dict:
    way = Sites(at="127.0.0.1:1", name="x", **{"quorum": 1, **settings})
    return {
        "settings": way.settings(),
        "weights": [[[2, 3], "float32"]],
        "buffers": {"bytes": 0, "segments": []},
    }


def joined(place: Meeting, site: str = "a", **settings) -> Errand:
    errand = Errand(visitor(place), site, terms(**settings), 5.0, lambda: False)
    errand.join(lambda: {"weights": WEIGHTS, "buffers": EMPTY})
    return errand


def contribution(sequence: int = 1, **changed) -> dict:
    payload = wire.bytes_of(torch.ones(2, 3))
    frame = {"site": "a", "sequence": sequence, "base": 0, "items": 4.0, "step": 0, "buffers": EMPTY}
    return {**frame, "payload": torch.frombuffer(bytearray(payload), dtype=torch.uint8), **changed}


def test_a_contribution_moves_the_weights_once():
    with meeting(secret=SECRET) as place:
        errand = joined(place)
        for _ in range(3):
            told = errand.give(contribution(), dict)
            assert (told.round, told.made) == (1, 1)
            assert torch.equal(told.weights[0], WEIGHTS[0] - 1)


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"payload": EMPTY}, PeerError),
        ({"payload": torch.zeros(25, dtype=torch.uint8)}, PeerError),
        ({"payload": torch.zeros(6)}, PeerError),
        ({"payload": 5}, PeerError),
        ({"buffers": torch.zeros(3, dtype=torch.uint8)}, PeerError),
        ({"items": 0}, PeerError),
        ({"items": float("nan")}, PeerError),
        ({"items": "many"}, PeerError),
        ({"sequence": 0}, PeerError),
        ({"sequence": True}, PeerError),
        ({"base": -1}, PeerError),
        ({"site": ""}, PeerError),
        ({"site": "a" * 101}, PeerError),
        ({"site": "a\n"}, PeerError),
        ({"payload": torch.full((24,), 255, dtype=torch.uint8)}, NonFiniteError),
    ],
)
def test_what_was_not_agreed_on_is_refused(changed, error):
    with meeting(secret=SECRET) as place:
        errand = joined(place)
        with pytest.raises(error):
            errand.give(contribution(**changed), dict)
        assert place.place.missing() == 1
        assert errand.give(contribution(), dict).made == 1


def test_of_two_runs_of_one_name_the_later_takes_part():
    with meeting(secret=SECRET) as place:
        first, second = joined(place), joined(place)
        with pytest.raises(MismatchError, match="Another run has joined as site 'a' since"):
            first.give(contribution(), dict)
        assert second.give(contribution(), dict).made == 1


def test_sites_with_other_settings_are_named_three_differences():
    with meeting(secret=SECRET) as place:
        joined(place)
        with pytest.raises(MismatchError) as caught:
            joined(place, "b", quorum=2, patience=3.0, outer=samestep.Nesterov(lr=0.5))
        text = str(caught.value)
        assert "settings.outer.kind: Nesterov here, Average at the meeting place" in text
        assert "settings.outer.lr: 0.5 here, None at the meeting place" in text
        assert text.count(" at the meeting place\n") == 3


def test_strangers_stay_out():
    with meeting(secret=SECRET) as place:
        errand = joined(place)
        for wrong in (b"", b"another secret is this"):
            with pytest.raises(MismatchError, match="does not know the secret"):
                visitor(place, wrong).ask("/leave", {"site": "a"}, 5.0)
        assert place.place.missing() == 1
        assert errand.give(contribution(), dict).made == 1


def relay(door: socket.socket, port: int) -> None:
    """Let one question through, and its answer with one bit of it flipped."""
    near, _ = door.accept()
    with near, socket.create_connection(("127.0.0.1", port)) as far:
        asked = b""
        while b"\r\n\r\n" not in asked or len(asked.partition(b"\r\n\r\n")[2]) < int(LENGTH.findall(asked)[0]):
            asked += near.recv(1 << 16)
        far.sendall(asked)
        told = b""
        while piece := far.recv(1 << 16):
            told += piece
        near.sendall(told[:-1] + bytes([told[-1] ^ 1]))


LENGTH = re.compile(rb"Content-Length: (\d+)")


def test_an_answer_that_was_changed_on_the_way_is_not_believed():
    with meeting(secret=SECRET) as place, socket.create_server(("127.0.0.1", 0)) as door:
        joined(place)
        helper = threading.Thread(target=relay, args=(door, place.port))
        helper.start()
        with pytest.raises(MismatchError, match="does not know the secret"):
            Visitor("127.0.0.1", door.getsockname()[1], SECRET).ask("/leave", {"site": "a"}, 5.0)
        helper.join()


def hostile(draw: random.Random, port: int) -> bytes:
    """Return what somebody sends who does not know the secret, or does and has gone mad."""
    body = draw.randbytes(draw.choice([0, 1, 100, 5000]))
    if draw.random() < 0.5:
        body = len(b'{"site":["a"]}').to_bytes(8, "little") + b'{"site":["a"]}' + body
    path = draw.choice(["/join", "/give", "/outcome", "/leave", "/else", "/" + "x" * 70000])
    length = draw.choice([len(body), len(body), "", -1, 10**30, "1e3", "\u0663"])
    digest = proof.digest(body).hex()
    told = proof.sign(SECRET, path.encode(), b"n", digest.encode()) if draw.random() < 0.6 else "0" * 64
    head = f"POST {path} HTTP/1.1\r\nContent-Length: {length}\r\nSamestep-Nonce: n\r\nSamestep-Digest: {digest}\r\n"
    message = f"{head}Samestep-Proof: {told}\r\n\r\n".encode() + body
    return draw.choice([message, message, message[: draw.randrange(len(message))], draw.randbytes(300)])


def test_whatever_comes_in_it_goes_on():
    draw = random.Random(3)
    with meeting(secret=SECRET) as place:
        errand = joined(place)
        for _ in range(300):
            with socket.create_connection(("127.0.0.1", place.port)) as connection:
                connection.settimeout(10)
                try:
                    connection.sendall(hostile(draw, place.port))
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(1 << 16):
                        pass
                except OSError:
                    continue
        assert errand.give(contribution(), dict).made == 1
        assert [text for text in place.told if "Site" in text and "'a'" not in text] == []


def test_who_is_not_there_is_said_to_be():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(Unreachable):
        Visitor("127.0.0.1", port, b"").ask("/leave", {}, 0.3)
    errand = Errand(Visitor("127.0.0.1", port, b""), "a", terms(), 0.3, lambda: False)
    with pytest.raises(PeerError, match="samestep meet HOST:PORT"):
        errand.join(dict)


@pytest.mark.parametrize(
    "settings",
    [
        {"at": "nowhere"},
        {"at": "host:0"},
        {"at": "host:99999"},
        {"at": 7077},
        {"name": ""},
        {"name": "a\tb"},
        {"every": 0},
        {"quorum": 0},
        {"bound": -1},
        {"patience": 0},
        {"patience": float("inf")},
        {"outer": 3},
        {"codec": "int8"},
        {"back": "int8"},
        {"inner": samestep.Local()},
    ],
)
def test_settings_that_cannot_be_are_refused(settings):
    with pytest.raises(SettingsError):
        samestep.Sites(**{"at": "127.0.0.1:7077", "name": "a", **settings})


def test_a_secret_is_needed_where_others_can_come(tmp_path: Path):
    assert read_secret(None, "127.0.0.1") == read_secret(None, "localhost") == read_secret(None, "::1") == b""
    with pytest.raises(SettingsError, match="without a secret"):
        read_secret(None, "0.0.0.0")
    with pytest.raises(SettingsError, match="without a secret"):
        read_secret(None, "example.org")
    (tmp_path / "short").write_text("abc\n")
    with pytest.raises(SettingsError, match="at least 16"):
        read_secret(str(tmp_path / "short"), "10.0.0.1")
    with pytest.raises(SettingsError, match="cannot be read"):
        read_secret(str(tmp_path / "none"), "10.0.0.1")
    assert address_of("[::1]:80") == ("::1", 80)
