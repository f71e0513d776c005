"""What workers print in one place, one after the other."""

import ctypes
import os
import signal

from samestep.launching.output import Plumbing, WorkerOutput


def worker(output, text, crashes=False):
    """Play a worker in a process of its own."""
    pid = os.fork()
    if not pid:
        output.enter()
        os.write(1, text)
        if crashes:
            ctypes.string_at(0)
        os._exit(0)
    output.forked()
    return os.waitpid(pid, 0)[1]


def test_the_next_worker_in_a_place_goes_on_with_its_file():
    output = WorkerOutput(1, Plumbing())
    assert os.WTERMSIG(worker(output, b"first\n", crashes=True)) == signal.SIGSEGV
    assert "Segmentation fault" in output.stack()
    output.again()
    assert output.stack() == "", "a crash is that of its own worker"
    assert worker(output, b"second\n") == 0
    text = output.text()
    assert text.startswith(b"first\nFatal Python error: Segmentation fault") and text.endswith(b"second\n")
    output.again()
    worker(output, b"", crashes=True)
    assert output.stack().startswith("Fatal Python error"), "it is written from the beginning"
    output.close()


def test_the_next_first_worker_gets_pipes_of_its_own():
    output = WorkerOutput(0, Plumbing(pipe_stdout=True))
    before = len(os.listdir("/proc/self/fd"))
    for text in (b"first", b"second"):
        worker(output, text)
        assert output.read(1) == text
        output.again()
    output.forked()
    assert len(os.listdir("/proc/self/fd")) < before
    output.close()
