import math
import socket
import threading

import numpy as np
import pytest

from samestep.launching.channel import ChannelReporter, Sender, channel


@pytest.fixture
def ends():
    sender, receiver = channel()
    yield sender, receiver
    sender.close()
    receiver.close()


def test_frames_arrive_in_order_and_whole(ends):
    sender, receiver = ends
    sender.send("a", {"x": 1, "y": [1.5, None, "é"]}, b"\0\1")
    sender.send("b")
    first, second = receiver.frames()
    assert (first.kind, first.info, first.blob) == ("a", {"x": 1, "y": [1.5, None, "é"]}, b"\0\1")
    assert (second.kind, second.info, second.blob) == ("b", {}, b"")
    assert list(receiver.frames()) == []
    assert not receiver.at_end


def test_a_frame_larger_than_the_pipe_arrives(ends):
    sender, receiver = ends
    blob = bytes(range(256)) * 20_000
    thread = threading.Thread(target=sender.send, args=("big", {}, blob))
    thread.start()
    frames = []
    while not frames:
        frames = list(receiver.frames())
    thread.join()
    assert frames[0].blob == blob


@pytest.mark.parametrize("cut", [3, 12, 15, -1])
def test_half_a_frame_is_not_shown(ends, cut):
    near, far = socket.socketpair()
    Sender(far).send("kind", {"x": 1}, b"blob")
    frame = near.recv(1 << 16)
    near.close()
    far.close()
    sender, receiver = ends
    connection = sender._connection
    connection.sendall(frame[:cut])
    assert list(receiver.frames()) == []
    connection.sendall(frame[cut:] + frame[:cut])
    assert [(whole.kind, whole.info, whole.blob) for whole in receiver.frames()] == [("kind", {"x": 1}, b"blob")]
    sender.close()
    assert list(receiver.frames()) == []
    assert receiver.at_end


def test_numbers_of_numpy_become_plain_and_the_rest_text(ends):
    sender, receiver = ends
    sender.send("a", {"x": np.float32(0.5), "y": np.arange(3), "z": math.inf})
    (frame,) = receiver.frames()
    assert frame.info == {"x": 0.5, "y": "[0 1 2]", "z": math.inf}


def test_a_reporter_speaks_the_three_words_a_run_knows(ends):
    sender, receiver = ends
    called = []
    reporter = ChannelReporter(sender, lambda: called.append(1), lambda: None)
    reporter.progress({"step": 1})
    reporter.note("a sentence")
    reporter.trace({"step": 1, "loss": 2.0, "tensors": {}})
    assert [(frame.kind, frame.info) for frame in receiver.frames()] == [
        ("progress", {"step": 1}),
        ("note", {"text": "a sentence"}),
        ("trace", {"step": 1, "loss": 2.0, "tensors": {}}),
    ]
    assert not called
    reporter.caught_up()
    assert called, "it acts in this process"
