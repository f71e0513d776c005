"""The Python stack of a worker that may answer nothing any more, and what it tells.

Python's fault handler writes it, inside a signal handler in C, so it needs neither the interpreter's lock nor a line
of Python. Processes that the worker forked (data loaders) inherit the handler and the file.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import signal
import sysconfig
import time
from dataclasses import dataclass

_SIGNAL = signal.SIGRTMIN + 9
"""One that nothing else uses: SIGUSR1 belongs to scripts and job schedulers."""
_ANSWER_SECONDS = 1.0
_QUIET_SECONDS = 0.03
_OWN = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_PYTHON = tuple(os.path.join(sysconfig.get_path(name), "") for name in ("stdlib", "platstdlib"))
_PACKAGES = ("/site-packages/", "/dist-packages/", "/torchinductor_")
_LOADER = os.path.join(_OWN, "data", "loader.py")

_AT_WORK = {
    r"torch/_dynamo/(convert_frame|symbolic_convert)\.py": "compiling",
    r"torch/_functorch/_aot_autograd/\w+\.py\", line \d+ in get_or_compile": "compiling",
    r"torch/_inductor/(graph|scheduler|async_compile)\.py": "compiling",
    r"torch/_inductor/compile_fx\.py\", line \d+ in _?(compile|fx_codegen)": "compiling",
    r"torch/utils/cpp_extension\.py": "compiling",
    r"triton/compiler/compiler\.py": "compiling",
    r"/bdb\.py": "in a debugger",
}
"""Calls that are on the stack only while something long and useful goes on."""


@dataclass(frozen=True)
class Frame:
    """One call on a stack."""

    path: str
    line: int
    function: str

    @property
    def place(self) -> str:
        return f"{os.path.basename(self.path)}:{self.line}"


class StackFile:
    """A file without a name that one worker's stacks are written to. Made before the fork."""

    def __init__(self, rank: int):
        self._descriptor = os.memfd_create(f"samestep-stack-{rank}", os.MFD_CLOEXEC)

    def enter(self) -> None:
        """In the forked worker: write the stack of every thread there when asked."""
        faulthandler.register(_SIGNAL, file=self._descriptor, all_threads=True, chain=False)

    def ask(self, pid: int, stopped: bool = False) -> str:
        """Return the stack of the worker, or of a process that it forked; empty if it does not answer within 1 s.

        Args:
            pid: the process; a child of this one, or of a child that is still there.
            stopped: let it go on first. What it may do then is undone like everything else since the newest state.
        """
        start = self._size()
        if not _catches(pid):
            return ""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, _SIGNAL)
            if stopped:
                os.kill(pid, signal.SIGCONT)
        return os.pread(self._descriptor, self._grown(start) - start, start).decode("utf-8", "replace")

    def close(self) -> None:
        """Give back this process's descriptor."""
        os.close(self._descriptor)

    def _size(self) -> int:
        return os.fstat(self._descriptor).st_size

    def _grown(self, start: int) -> int:
        """Return the file's size once it has grown and then stayed so for a while."""
        begin = changed = time.monotonic()
        size = start
        while True:
            now, size_now = time.monotonic(), self._size()
            if size_now != size:
                size, changed = size_now, now
            if now - begin > _ANSWER_SECONDS or (size > start and now - changed > _QUIET_SECONDS):
                return size
            time.sleep(0.005)


def frames_of(text: str) -> list[Frame]:
    """Return the main thread's calls, innermost first, from what the fault handler wrote."""
    frames: list[Frame] = []
    for line in text.splitlines():
        if re.match(r"(Current thread|Thread) 0x", line):
            frames = []  # the main thread is the oldest, and comes last
        elif call := re.match(r'  File "(.*)", line (\d+) in (.*)', line):
            frames.append(Frame(call[1], int(call[2]), call[3]))
    return frames


def line_of_user(text: str) -> str:
    """Return the innermost line of the user's, as "train.py:40"; empty if there is none."""
    frames = frames_of(text)
    foreign = [f for f in frames if not f.path.startswith(("<", _OWN))]
    users = [f for f in foreign if not f.path.startswith(_PYTHON) and not any(p in f.path for p in _PACKAGES)]
    return next((frame.place for frame in users), "")


def line_in_loader(text: str) -> str:
    """Return the innermost line of the user's that a loader process is in; empty if it is in none."""
    frames = frames_of(text)
    serving = [i for i, frame in enumerate(frames) if frame.path == _LOADER and frame.function == "_serve"]
    if not serving:
        return ""
    inner = [f'  File "{f.path}", line {f.line} in {f.function}' for f in frames[: serving[0]]]
    return line_of_user("\n".join(inner))


def work_in(text: str) -> str:
    """Return what long but useful work a stack shows ("compiling"); empty if none."""
    return next((what for call, what in _AT_WORK.items() if re.search(call, text)), "")


def state_of(pid: int) -> str:
    """Return the kernel's letter for what a process does (R, S, D, T, t, Z); empty if it is gone."""
    return next(iter(_facts_of(pid)), "")


def ticks_of(pid: int) -> int:
    """Return the processor time that a process has used, all its threads together, in ticks of the kernel (mostly 10 ms
    each); 0 if it is gone."""
    return sum(map(int, _facts_of(pid)[11:13]))


def children_of(pid: int) -> list[int]:
    """Return the processes that any thread of a process started."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children") as file:
                found += map(int, file.read().split())
    return found


def _facts_of(pid: int) -> list[str]:
    """Return what the kernel tells of a process, from its state on; nothing if it is gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(") ")[2].split()
    except OSError:
        return []


def _catches(pid: int) -> bool:
    """Whether a process has a handler for the signal. Without one it would end it."""
    try:
        with open(f"/proc/{pid}/status") as file:
            mask = next(line.split()[1] for line in file if line.startswith("SigCgt"))
    except (OSError, StopIteration):
        return False
    return bool(int(mask, 16) >> (_SIGNAL - 1) & 1)
