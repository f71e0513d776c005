"""The meeting place's door: strangers stay out, and whatever comes in, it goes on answering."""

from __future__ import annotations

import contextlib
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from meeting import Meeting, meeting

import samestep
from samestep.errors import CheckpointError, MismatchError, NonFiniteError, PeerError, SettingsError
from samestep.sites import proof
from samestep.sites import server as server_module
from samestep.sites import visitor as visitor_module
from samestep.sites.errand import Errand, Told
from samestep.sites.place import Place
from samestep.sites.proof import read_secret
from samestep.sites.recipe import Sites
from samestep.sites.terms import check_alike
from samestep.sites.visitor import Unreachable, Visitor, address_of
from samestep.storage import checkpoint, wire

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
        "names": ["weight"],
        "frozen": "",
        "buffers": {"bytes": 0, "segments": []},
    }


class Joined(Errand):
    """A site that has joined."""

    def __init__(self, place: Meeting, site: str = "a", **settings):
        super().__init__(visitor(place), site, terms(**settings), 60.0, lambda: False)
        self.told = self.join(start)

    def bring(self, **changed) -> Told:
        """Give a contribution."""
        return self.give(contribution(**{"training": self.told.training, **changed}), start, (0, 0))


def start() -> dict:
    return {"weights": WEIGHTS, "buffers": EMPTY, "training": ""}


def contribution(sequence: int = 1, **changed) -> dict:
    payload = wire.bytes_of(torch.ones(2, 3))
    frame = {"sequence": sequence, "first": sequence - 1, "base": 0, "items": 4.0, "step": 0, "training": ""}
    return {**frame, "buffers": EMPTY, "payload": torch.frombuffer(bytearray(payload), dtype=torch.uint8), **changed}


def test_a_contribution_moves_the_weights_once():
    with meeting(secret=SECRET) as place:
        errand = Joined(place)
        for _ in range(3):
            told = errand.bring()
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
        ({"items": 0.0}, PeerError),
        ({"items": float("nan")}, PeerError),
        ({"items": "many"}, PeerError),
        ({"sequence": 0}, PeerError),
        ({"sequence": True}, PeerError),
        ({"base": -1}, PeerError),
        ({"training": ""}, PeerError),
        ({"training": "a" * 101}, PeerError),
        ({"training": "a\n"}, PeerError),
        ({"items": 10**400}, PeerError),
        ({"items": 1e300}, PeerError),
        ({"payload": torch.full((24,), 255, dtype=torch.uint8)}, NonFiniteError),
    ],
)
def test_what_was_not_agreed_on_is_refused(changed, error):
    with meeting(secret=SECRET) as place:
        errand = Joined(place)
        with pytest.raises(error):
            errand.bring(**changed)
        assert place.place.missing() == 1
        assert errand.bring().made == 1


def test_of_two_runs_of_one_name_the_later_takes_part():
    with meeting(secret=SECRET) as place:
        first, second = Joined(place), Joined(place)
        with pytest.raises(MismatchError, match="Another run has joined as site 'a' since"):
            first.bring()
        assert second.bring().made == 1


def test_who_came_later_takes_leave_for_its_site():
    """As the next worker does, where the first one has died."""
    with meeting(secret=SECRET) as place:
        Joined(place, "a", quorum=2)
        Joined(place, "b", quorum=2)
        assert place.place.missing() == 2
        later = Errand(visitor(place), "a", terms(quorum=2), 5.0, lambda: False)
        later.leave(start, (0, 0))
        assert place.place.missing() == 1


def test_who_has_ended_is_not_waited_for_by_a_place_that_is_started_again(tmp_path):
    """Which no round has written: without it, the last site would wait for ever."""
    folder = str(tmp_path)
    with meeting(secret=SECRET, folder=folder) as place:
        Joined(place, "a", quorum=2)
        Joined(place, "b", quorum=2).leave(start, (0, 0))
    with meeting(secret=SECRET, folder=folder) as place:
        assert place.place.missing() == 1
        Joined(place, "b", quorum=2)
        assert place.place.missing() == 2
    with meeting(secret=SECRET, folder=folder) as place:
        assert place.place.missing() == 2


def test_a_round_that_finds_its_name_taken_on_disk_is_made_all_the_same(tmp_path):
    """Its site must not end because of the place's folder."""
    with meeting(secret=SECRET, folder=str(tmp_path)) as place:
        errand = Joined(place)
        checkpoint.write(tmp_path, step=1, weights={"0": torch.ones(3)}, state={}, facts={})
        assert errand.bring().made == 1
        assert errand.bring(sequence=2, first=1, base=1).made == 2
        assert any(text.startswith("ROUND 1 IS NOT ON DISK") for text in place.told)


def test_a_damaged_state_makes_room_for_its_round(tmp_path):
    with meeting(secret=SECRET, folder=str(tmp_path)) as place:
        Joined(place).bring()
    (tmp_path / "step-00000001" / checkpoint.WEIGHTS).write_bytes(b"torn")
    with meeting(secret=SECRET, folder=str(tmp_path)) as place:
        assert "moved to" in place.told[0]
        assert Joined(place).bring().made == 1
        assert not any("NOT ON DISK" in text for text in place.told)
    checkpoint.verify(tmp_path / "step-00000001")


def test_the_folder_of_a_run_is_no_place(tmp_path):
    checkpoint.write(tmp_path, step=1, weights={"0.weight": torch.ones(3)}, state={}, facts={"a": 1})
    with pytest.raises(CheckpointError, match="is not the state of a meeting place"):
        Place(str(tmp_path))


def test_sites_with_other_settings_are_named_three_differences():
    with meeting(secret=SECRET) as place:
        Joined(place)
        with pytest.raises(MismatchError) as caught:
            Joined(place, "b", quorum=2, patience=3.0, outer=samestep.Nesterov(lr=0.5))
        text = str(caught.value)
        assert "settings.outer.kind: Nesterov here, Average at the meeting place" in text
        assert "settings.outer.lr: 0.5 here, None at the meeting place" in text
        assert text.count(" at the meeting place\n") == 3


def test_strangers_stay_out():
    with meeting(secret=SECRET) as place:
        errand = Joined(place)
        for wrong in (b"", b"another secret is this"):
            with pytest.raises(MismatchError, match="does not know the secret"):
                visitor(place, wrong).ask("/leave", {"site": "a"}, 5.0)
        assert place.place.missing() == 1
        assert errand.bring().made == 1


def test_of_another_model_its_first_other_tensor_is_named():
    alike = {**terms(), "weights": [[[2, 3], "float32"]] * 300, "names": [f"layer {n}" for n in range(300)]}
    other = {**alike, "weights": [*alike["weights"][:-1], [[4, 3], "float32"]]}
    fewer = {**alike, "weights": alike["weights"][:-1], "names": alike["names"][:-1]}
    with pytest.raises(MismatchError, match=r"weights\[299\]: \[\[4, 3\], 'float32'\] here, \[\[2, 3\]"):
        check_alike(other, alike, "a")
    with pytest.raises(MismatchError, match=r"weights: 299 of them here, 300 at") as caught:
        check_alike(fewer, alike, "a")
    assert len(str(caught.value)) < 400


def test_a_site_of_a_larger_model_is_refused_before_it_brings_its_weights():
    with meeting(secret=SECRET) as place:
        Joined(place)
        larger = Errand(visitor(place), "b", sized(torch.zeros(1 << 20)), 5.0, lambda: False)
        with pytest.raises(MismatchError, match="differs from the sites"):
            larger.give(contribution(), start, (3, 1))


LENGTH = re.compile(rb"Content-Length: (\d+)")
THROUGH = None
"""What a relay does with an answer: lets it through."""


class Relay:
    """Lets questions through to a place, and their answers changed; keeps both.

    Attributes:
        port: where it listens.
        asked, told: the bytes of each.
    """

    def __init__(self, port: int, *changes: Callable[[bytes], bytes] | None):
        self.asked: list[bytes] = []
        self.told: list[bytes] = []
        self._door = socket.create_server(("127.0.0.1", 0))
        self.port = self._door.getsockname()[1]
        self._thread = threading.Thread(target=self._run, args=(port, changes), daemon=True)
        self._thread.start()

    def _run(self, port: int, changes: Sequence[Callable[[bytes], bytes] | None]) -> None:
        for change in changes:
            near, _ = self._door.accept()
            with near:
                asked = b""
                while not (sizes := LENGTH.findall(asked)) or len(asked.partition(b"\r\n\r\n")[2]) < int(sizes[0]):
                    asked += near.recv(1 << 16)
                self.asked.append(asked)
                self.told.append(sent(port, asked))
                near.sendall(self.told[-1] if change is THROUGH else change(self.told[-1]))

    def close(self) -> None:
        self._thread.join()
        self._door.close()


def sent(port: int, asked: bytes) -> bytes:
    """Return what a place answers to some bytes."""
    told = b""
    with socket.create_connection(("127.0.0.1", port)) as far:
        far.sendall(asked)
        while piece := far.recv(1 << 16):
            told += piece
    return told


def flipped(told: bytes) -> bytes:
    return told[:-1] + bytes([told[-1] ^ 1])


def test_an_answer_that_was_changed_on_the_way_is_not_believed():
    with meeting(secret=SECRET) as place:
        relay = Relay(place.port, THROUGH, flipped)
        with pytest.raises(MismatchError, match="does not know the secret"):
            Visitor("127.0.0.1", relay.port, SECRET).ask("/leave", {"site": "a", "life": "b"}, 5.0)
        relay.close()


def http(status: int, content: bytes = b"<html>busy</html>") -> Callable[[bytes], bytes]:
    """Return what a proxy makes of any answer."""
    head = f"HTTP/1.1 {status} What\r\nContent-Type: text/html\r\nContent-Length: {len(content)}\r\n\r\n"
    return lambda told: head.encode() + content


def cut_off(told: bytes) -> bytes:
    return told[:-3]


@pytest.mark.parametrize("change", [http(502), http(503), cut_off, lambda told: b""])
def test_what_a_broken_way_answers_is_no_reason_to_end_a_run_that_begins(monkeypatch, change):
    monkeypatch.setattr(visitor_module, "_PAUSES", (0.01,))
    with meeting(secret=SECRET) as place:
        relay = Relay(place.port, THROUGH, change, THROUGH)
        assert Visitor("127.0.0.1", relay.port, SECRET).ask("/newest", {}, 5.0)[0] == 410
        relay.close()


@pytest.mark.parametrize("change", [http(200), http(302), http(404), flipped])
def test_who_is_no_meeting_place_is_told_so_at_the_beginning_and_tried_again_later(monkeypatch, change):
    monkeypatch.setattr(visitor_module, "_PAUSES", (0.01,))
    with meeting(secret=SECRET) as place:
        relay = Relay(place.port, THROUGH, change)
        with pytest.raises(MismatchError, match="is no meeting place"):
            Visitor("127.0.0.1", relay.port, SECRET).ask("/newest", {}, 5.0)
        relay.close()
        relay = Relay(place.port, THROUGH, THROUGH, change, change, THROUGH)
        known = Visitor("127.0.0.1", relay.port, SECRET)
        assert [known.ask("/newest", {}, 5.0)[0] for _ in range(2)] == [410, 410]
        relay.close()


def test_a_long_question_finds_a_place_that_was_started_again():
    """Which refuses it before it is read, as the proof is one for the place's life before."""
    long = {"much": torch.zeros(16 << 20, dtype=torch.uint8)}
    with meeting(secret=SECRET) as place:
        known = visitor(place)
        assert known.ask("/newest", {}, 5.0)[0] == 410
    with meeting(secret=SECRET, port=place.port):
        assert known.ask("/newest", long, 1.0)[0] == 410


def test_what_was_asked_and_answered_before_is_not_believed_again():
    with meeting(secret=SECRET) as place:
        joined = Joined(place)
        relay = Relay(place.port, THROUGH, THROUGH)
        question = "/newest", {"site": "a"}, 5.0
        assert Visitor("127.0.0.1", relay.port, SECRET).ask(*question)[0] == 200
        relay.close()
        known = relay.told[1]
        assert known.startswith(b"HTTP/1.0 200") and sent(place.port, relay.asked[1]).startswith(b"HTTP/1.0 403")
        later = Relay(place.port, THROUGH, lambda told: known)
        with pytest.raises(MismatchError, match="does not know the secret"):
            Visitor("127.0.0.1", later.port, SECRET).ask(*question)
        later.close()
        assert joined.bring().made == 1
    # Nor by a place that was started again.
    with meeting(secret=SECRET) as place:
        assert sent(place.port, relay.asked[1]).startswith(b"HTTP/1.0 403")


def test_a_link_may_be_slower_than_any_timeout(monkeypatch):
    """Timeouts hold for a piece, both ways."""
    with meeting(secret=SECRET) as place:
        # torch imports some of its parts when the first optimizer is made, which may take seconds.
        Joined(place)
    monkeypatch.setattr(visitor_module, "_PIECE_SECONDS", 1.0)
    monkeypatch.setattr(visitor_module, "_CONNECT_SECONDS", 1.0)
    monkeypatch.setattr(server_module, "_BODY_SECONDS", 1.0)
    many = torch.zeros(1 << 20)
    with meeting(secret=SECRET) as place, socket.create_server(("127.0.0.1", 0)) as door:
        # Two for the first question, since each life of a place wants proofs of its own; before the weights, one that
        # asks whether it is still that life.
        link = threading.Thread(target=trickle, args=(door, place.port, 4 << 20, 4))
        link.start()
        slow = Errand(Visitor("127.0.0.1", door.getsockname()[1], SECRET), "a", sized(many), 5.0, lambda: False)
        begin = time.monotonic()
        told = slow.join(lambda: {**start(), "weights": [many]})
        assert torch.equal(told.weights[0], many)
        assert time.monotonic() - begin > 1.5
        link.join()


def sized(weights: torch.Tensor) -> dict:
    return terms() | {"weights": [[list(weights.shape), "float32"]]}


def trickle(door: socket.socket, port: int, bytes_per_second: int, num_connections: int) -> None:
    """Be a slow link with small buffers."""

    def pump(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(1 << 15):
                time.sleep(len(piece) / bytes_per_second)
                target.sendall(piece)
            target.shutdown(socket.SHUT_WR)

    for _ in range(num_connections):
        near, _ = door.accept()
        with near, socket.create_connection(("127.0.0.1", port)) as far:
            for end in (near, far):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
            pumps = [threading.Thread(target=pump, args=ends) for ends in ((near, far), (far, near))]
            for one in pumps:
                one.start()
            for one in pumps:
                one.join()


def test_a_round_that_cannot_be_made_counts_in_none_and_leaves_all_as_it_was():
    huge = wire.bytes_of(torch.full((2, 3), 3e38))
    payload = torch.frombuffer(bytearray(huge), dtype=torch.uint8)
    with meeting(secret=SECRET) as place:
        errand = Joined(place, outer=samestep.Momentum(lr=1.0, momentum=0.9))
        assert errand.bring().made == 1
        told = errand.bring(sequence=2, payload=payload, base=1)
        assert (told.made, told.round) == (2, 2)
        told = errand.bring(sequence=3, payload=payload, base=2)
        assert (told.made, told.round) == (-1, 2) and torch.isfinite(told.weights[0]).all()
        assert any("it counts in none" in text for text in place.told)


def test_a_place_whose_listener_is_gone_goes_on():
    def gone(text: str) -> None:
        raise BrokenPipeError

    with meeting(secret=SECRET) as place:
        place.place._listener = gone
        assert Joined(place).bring().made == 1


def test_a_place_that_lost_everything_goes_on_from_who_knows_most():
    with meeting(secret=SECRET) as place:
        first = Joined(place)
        told = first.bring()
    with meeting(secret=SECRET) as place:
        # Somebody new comes first, with other weights.
        other = Errand(visitor(place), "new", terms(), 5.0, lambda: False)
        joined = other.join(lambda: {**start(), "weights": [WEIGHTS[0] + 100]})
        back = Errand(visitor(place), "a", terms(), 5.0, lambda: False)
        brings = {"weights": told.weights, "buffers": EMPTY, "training": told.training}
        again = back.give(contribution(2, training=told.training, base=1), lambda: brings, (1, 1))
        assert again.made == 2 and torch.equal(again.weights[0], WEIGHTS[0] - 2)
        assert back.give(contribution(1, training=told.training), lambda: brings, (1, 1)).made == 0
        refused = other.give(contribution(1, training=joined.training), start, (0, 0))
        assert refused.made == -1 and torch.equal(refused.weights[0], WEIGHTS[0] - 2)


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
        errand = Joined(place)
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
        assert errand.bring().made == 1
        assert [text for text in place.told if "Site" in text and "'a'" not in text] == []


def test_a_place_that_says_nothing_does_not_keep_a_run_from_its_end():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        asked: list[int] = []
        unheard = Visitor("127.0.0.1", silent.getsockname()[1], b"", lambda: asked.append(1) or len(asked) > 3)
        begin = time.monotonic()
        with pytest.raises(Unreachable, match="the run is to end"):
            unheard.ask("/leave", {}, 600.0)
        assert time.monotonic() - begin < visitor_module._PIECE_SECONDS / 2


def is_closed(connection: socket.socket) -> bool:
    """Return whether the other side hangs up, in good time."""
    connection.settimeout(30.0)
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


def test_strangers_take_some_connections_for_some_time(monkeypatch):
    """Idle ones are as many as one host may have; no longer than its head may take, byte by byte, either."""
    monkeypatch.setattr(server_module, "_MOST_OF_ONE", 3)
    with meeting(secret=SECRET) as place, contextlib.ExitStack() as stack:

        def connected() -> socket.socket:
            return stack.enter_context(socket.create_connection(("127.0.0.1", place.port)))

        first = [connected() for _ in range(3)]
        assert is_closed(connected())
        monkeypatch.setattr(server_module, "_HEAD_SECONDS", 0.5)
        with pytest.raises(OSError):
            while True:
                # Never idle for as long as a timeout.
                first[0].sendall(b"x")
                time.sleep(0.05)
        assert all(map(is_closed, first[1:]))
        assert Joined(place).bring().made == 1


def test_nonces_are_forgotten_with_the_life_that_they_hold_in(monkeypatch):
    monkeypatch.setattr(server_module, "_MOST_NONCES", 3)
    with meeting(secret=SECRET) as place:
        relay = Relay(place.port, THROUGH, THROUGH)
        assert Visitor("127.0.0.1", relay.port, SECRET).ask("/newest", {}, 5.0)[0] == 410
        relay.close()
        known = visitor(place)
        for _ in range(10):
            assert known.ask("/newest", {}, 5.0)[0] == 410
        assert len(place._server._nonces) <= 3
        assert sent(place.port, relay.asked[1]).startswith(b"HTTP/1.0 403")


@pytest.mark.skipif(not socket.has_ipv6, reason="this machine has no IPv6")
def test_sites_meet_at_an_ipv6_address():
    try:
        server = server_module.Server("::1", 0, Place(None, lambda text: None), SECRET)
    except SettingsError:
        pytest.skip("this machine has no IPv6 loopback")
    with server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        host, port = address_of(f"[::1]:{server.server_address[1]}")
        errand = Errand(Visitor(host, port, SECRET), "a", terms(), 60.0, lambda: False)
        errand.join(start)
        assert errand.give(contribution(training=server.place.training), start, (0, 0)).made == 1
        server.shutdown()
        thread.join()


def test_who_is_not_there_is_said_to_be():
    with pytest.raises(Unreachable, match="a..b:80 does not answer"):
        Visitor("a..b", 80, b"").ask("/leave", {}, 0.3)
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
        {"at": "::1:80"},
        {"at": "fe80::1"},
        {"at": "host:99999"},
        {"at": 7077},
        {"name": ""},
        {"name": "a\tb"},
        {"every": 0},
        {"quorum": 0},
        {"bound": -1},
        {"patience": 0},
        {"patience": float("inf")},
        {"reach": 0},
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
