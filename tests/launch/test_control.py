"""The door of a run: only its user comes in, says one short thing, and nothing that is said brings the run down."""

import gc
import os
import random
import socket
import struct

import pytest

from samestep.core.worker import Wish
from samestep.errors import SettingsError, WorkerError
from samestep.launching import control, request, runs
from samestep.launching.channel import Frame
from samestep.launching.control import MOST_GUESTS, Control
from samestep.launching.orders import Orders

SEATED = Frame("seated", {"num_workers": 2, "options": {"replicas": 4}, "can_scale": True})


def check(settings, num_workers):
    if num_workers > settings["replicas"]:
        raise SettingsError(f"{num_workers} workers for {settings['replicas']} replicas.")


class Room:
    """A door, and guests of it."""

    def __init__(self):
        self.orders = Orders()
        self.control = Control("my train.py", self.orders, check)
        self.signals = []
        self.guests = []

    def guest(self):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(2)
        with runs._folder(make=False) as place:
            connection.connect(f"{place}/{self.control.name}.run")
        self.guests.append(connection)
        return connection

    def serve(self):
        for _ in range(4):
            self.control.serve(self.signals)

    def answer(self, data):
        """What a guest that says `data` is told; None if nothing, yet or ever."""
        guest = self.guest()
        guest.sendall(data)
        self.serve()
        return self.heard(guest)

    def heard(self, guest):
        guest.setblocking(False)
        try:
            return request.unpacked(guest.recv(1 << 16) or b"no")
        except (BlockingIOError, ConnectionError, WorkerError):
            return None


@pytest.fixture
def room(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    gc.collect()
    before = set(os.listdir("/proc/self/fd"))
    made = Room()
    yield made
    for guest in made.guests:
        guest.close()
    made.control.close("It ended.")
    assert not set(os.listdir("/proc/self/fd")) - before
    assert list(tmp_path.iterdir()) == []


def test_status_scale_and_stop(room):
    assert room.control.name == f"my_train-{os.getpid()}"
    asked = request.packed({"ask": "scale", "workers": 3})
    assert "still starting" in room.answer(asked)["error"]
    room.control.hear(SEATED)
    room.control.hear(Frame("progress", {"step": 7, "steps": 9, "samples_per_second": 3.5, "loss": 1.0}))
    told = room.answer(request.packed({"ask": "status"}))
    assert (told["workers"], told["step"], told["steps"], told["pid"]) == (2, 7, 9, os.getpid())

    assert room.answer(request.packed({"ask": "scale", "workers": 2})) == {"workers": 2}
    refused = room.answer(request.packed({"ask": "scale", "workers": 5}))
    assert refused == {"error": "5 workers for 4 replicas.", "refused": True}
    assert room.orders.pending() == 0
    waiting = room.guest()
    waiting.sendall(asked)
    room.serve()
    assert room.heard(waiting) is None
    assert (room.control.target, room.orders.pending()) == (3, Wish.SCALE)
    # A fleet that died and came back has not been scaled.
    room.control.hear(SEATED)
    assert room.heard(waiting) is None
    assert room.control.scaled() and not room.control.scaled()
    assert room.orders.pending() == 0
    room.control.hear(Frame("seated", {**SEATED.info, "num_workers": 3}))
    assert room.heard(waiting) == {"workers": 3}

    stopping = [room.guest() for _ in range(2)]
    for guest in stopping:
        guest.sendall(request.packed({"ask": "stop"}))
    room.serve()
    assert len(room.signals) == 1, "asked twice is not the second signal"
    assert "being stopped" in room.answer(asked)["error"]
    room.control.close("All is kept.")
    assert [room.heard(guest) for guest in stopping] == [{"message": "All is kept."}] * 2
    room.control = Control("my train.py", room.orders, check)


def test_a_run_whose_later_launch_goes_on_is_not_scaled(room):
    room.control.hear(Frame("seated", {**SEATED.info, "can_scale": False}))
    assert "later launch()" in room.answer(request.packed({"ask": "scale", "workers": 1}))["error"]
    assert room.orders.pending() == 0


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b"\xff\xfe",
        b"[" * 4000,
        b'{"ask": ["stop"]}',
        b'{"ask": "scale"}',
        b'{"ask": "scale", "workers": true}',
        b'{"ask": "scale", "workers": 1e3}',
        b'{"ask": "scale", "workers": ' + b"9" * 4000 + b"}",
        b'{"ask": "scale", "workers": "3"}',
        b'{"ask": "eval"}',
    ],
)
def test_nonsense_is_answered_with_an_error(room, body):
    room.control.hear(SEATED)
    told = room.answer(struct.pack("!4sHH", b"sams", request.VERSION, len(body)) + body)
    if b"true" in body:
        return  # `check` decides; that of a real run refuses it.
    assert told["error"]
    assert room.orders.pending() == 0 and not room.signals and not room.control._guests


def test_another_version_is_told(room):
    told = room.answer(struct.pack("!4sHH", b"sams", request.VERSION + 1, 2) + b"{}")
    assert "different versions" in told["error"]


def test_frames_are_bounded_before_they_are_read(room):
    told = room.answer(struct.pack("!4sHH", b"sams", request.VERSION, 65535))
    assert "longer than it may be" in told["error"]
    guest = room.guest()
    guest.setblocking(False)
    sent = 0
    try:
        while sent < 10_000_000:
            sent += guest.send(b"sams" + b"\0" * 65536)
            room.serve()
    except OSError:
        pass
    assert sent < 1_000_000, "nobody reads on"
    assert not room.control._guests


def test_hostile_bytes_do_no_harm(room):
    room.control.hear(SEATED)
    draw = random.Random(5)
    good = [request.packed(facts) for facts in ({"ask": "status"}, {"ask": "scale", "workers": 9}, {"x": "y" * 900})]
    for _ in range(1500):
        data = bytearray(draw.choice(good) if draw.random() < 0.8 else draw.randbytes(draw.randrange(6000)))
        for _ in range(draw.randrange(4)):
            if data:
                at = draw.randrange(len(data))
                data[at : at + draw.randrange(3)] = draw.randbytes(draw.randrange(3))
        guest = room.guest()
        cut = draw.randrange(len(data) + 1)
        for part in (data[:cut], data[cut:]):
            try:
                guest.sendall(part)
            except OSError:
                break
            if draw.random() < 0.7:
                room.serve()
            if draw.random() < 0.2:
                guest.close()
                break
        room.serve()
        assert len(room.control._guests) <= MOST_GUESTS
        assert all(len(g.said) <= request.FRAME_BYTES + 1 for g in room.control._guests.values())
        if len(room.guests) > 12:
            room.guests.pop(0).close()
    for guest in room.guests:
        guest.close()
    room.serve()
    assert not room.control._guests
    assert room.answer(request.packed({"ask": "status"}))["workers"] == 2


def test_room_is_for_few_and_the_silent_have_to_go(room, monkeypatch):
    silent = [room.guest() for _ in range(8)]
    room.serve()
    room.serve()
    silent += [room.guest() for _ in range(8)]
    for _ in range(4):
        room.serve()
    assert len(room.control._guests) == MOST_GUESTS
    assert "are asking this run already" in room.answer(b"")["error"]
    monkeypatch.setattr(control, "SECONDS_TO_ASK", -1.0)
    assert room.answer(request.packed({"ask": "status"}))["pid"] == os.getpid()
    assert silent[0].recv(10) == b""


def test_another_user_is_not_let_in(room, monkeypatch):
    class Other(struct.Struct):
        def unpack(self, data):
            pid, uid, gid = super().unpack(data)
            return pid, uid + 1, gid

    monkeypatch.setattr(control, "_CREDENTIALS", Other("3i"))
    assert room.answer(request.packed({"ask": "status"})) is None
    assert not room.control._guests


def test_a_folder_that_others_may_enter_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "samestep").mkdir(mode=0o755)
    with pytest.raises(PermissionError, match="only you may enter"):
        Control("train.py", Orders(), check)
    assert runs.live() == []


def test_a_run_that_is_gone_leaves_no_trace(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    runs.bind("dead-1").close()
    assert os.listdir(tmp_path / "samestep") == ["dead-1.run"]
    assert runs.live() == []
    assert list(tmp_path.iterdir()) == []


def test_names_and_prefixes(monkeypatch):
    monkeypatch.setattr(runs, "live", lambda: [{"name": n} for n in ("train-1", "train-12", "other-3")])
    assert runs.find("o") == "other-3"
    assert runs.find("train-1") == "train-1"
    with pytest.raises(SettingsError, match="train-1, train-12 all begin so"):
        runs.find("tr")
    with pytest.raises(SettingsError, match="These do: train-1, train-12, other-3"):
        runs.find("x")
    assert runs.name_of("../.a b;c.py") == f"_.a_b_c-{os.getpid()}"


def test_the_answer_always_fits(room):
    long = "ä\x01\udc80" * 3000
    waiting = room.guest()
    waiting.sendall(request.packed({"ask": "stop"}))
    room.serve()
    room.control.close(long)
    assert room.heard(waiting)["message"].startswith("ä")
    room.control = Control("my train.py", room.orders, check)
