"""What workers print: unseen, or where the first does; one after the other in a slot, and when the first is gone."""

import ctypes
import os
import signal
import sys

from samestep.launching.output import Outlet, Plumbing, WorkerOutput


def worker(output, outlet, act, is_first=False):
    """Play a worker in a process of its own; `act` is what it does."""
    pid = os.fork()
    if not pid:
        output.enter(outlet, is_first)
        act()
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def saying(text, crashes=False):
    def act():
        os.write(1, text)
        if crashes:
            ctypes.string_at(0)

    return act


def test_the_next_worker_in_a_place_goes_on_with_its_file():
    output, outlet = WorkerOutput(1), Outlet(Plumbing())
    assert os.WTERMSIG(worker(output, outlet, saying(b"first\n", crashes=True))) == signal.SIGSEGV
    assert "Segmentation fault" in output.stack()
    output.again()
    assert output.stack() == "", "a crash is that of its own worker"
    assert worker(output, outlet, saying(b"second\n")) == 0
    text = output.text()
    assert text.startswith(b"first\nFatal Python error: Segmentation fault") and text.endswith(b"second\n")
    output.again()
    worker(output, outlet, saying(b"", crashes=True))
    assert output.stack().startswith("Fatal Python error"), "it is written from the beginning"
    output.close()


def test_the_first_prints_to_the_outlet_and_others_do_not():
    before = len(os.listdir("/proc/self/fd"))
    outlet, first, second = Outlet(Plumbing(pipe_stdout=True)), WorkerOutput(0), WorkerOutput(1)
    worker(first, outlet, saying(b"seen"), is_first=True)
    worker(second, outlet, saying(b"unseen"))
    assert (outlet.read(1), first.text(), second.text()) == (b"seen", b"", b"unseen")
    for thing in (outlet, first, second):
        thing.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_who_takes_over_shows_what_the_first_may_not_have_shown():
    outlet, output = Outlet(Plumbing(pipe_stdout=True)), WorkerOutput(1)

    def act():
        for number in range(1, 4):
            os.write(1, f"before call {number}\n".encode())
            output.mark(number)
        os.write(1, b"after call 3\n")
        output.take_over(num_calls=2)
        os.write(1, b"as the first\n")

    worker(output, outlet, act)
    assert outlet.read(1) == b"before call 3\nafter call 3\nas the first\n"
    outlet.close()
    output.close()


def test_hidden_prints_stay_hidden():
    outlet, output = Outlet(Plumbing(pipe_stdout=True, hidden=True)), WorkerOutput(1)

    def act():
        os.write(1, b"one\n")
        output.take_over(num_calls=0)
        os.write(1, b"two\n")

    worker(output, outlet, act)
    assert (outlet.pipes, output.text()) == ({}, b"one\ntwo\n")
    output.close()


def test_prints_that_nobody_reads_any_more_are_no_error(monkeypatch):
    # The test runner's own writes elsewhere.
    monkeypatch.setattr(sys, "stdout", open(1, "w", closefd=False))  # noqa: SIM115  closes nothing
    outlet, output = Outlet(Plumbing(pipe_stdout=True)), WorkerOutput(0)
    os.close(outlet.pipes.pop(1))

    def act():
        print("a line")
        print("and a half", end="", flush=True)

    assert worker(output, outlet, act, is_first=True) == 0
    outlet.close()
    output.close()
