"""The user's process, which called `samestep.launch` outside of any worker: starts a zygote and waits for it.

The zygote is a fresh process: this one may have threads, a GPU, a notebook's event loop, and none of them survives a
fork.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TextIO

from samestep.launching.channel import Frame, Receiver, Sender
from samestep.launching.environment import for_zygote
from samestep.launching.payload import Payload

_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_ENTRY = (
    "import sys; sys.path[:1] = [sys.argv[1]]; from samestep.settings import serve; "
    "sys.exit(serve(int(sys.argv[2]), int(sys.argv[3])))"
)


@dataclass(frozen=True, kw_only=True)
class Reply:
    """How a launch call ended.

    Attributes:
        code: exit code of the run; 0 is success.
        message: the failure, for the user.
        result: what the function returned, as the workers packed it; None if there is nothing.
    """

    code: int
    message: str = ""
    result: bytes | None = None


def call(payload: Payload) -> Reply:
    """Run the payload in a fresh zygote and its workers.

    Raises:
        KeyboardInterrupt: Ctrl-C; every process of the run has ended before it is raised. Says what was kept.
    """
    near, far = socket.socketpair()
    pipes = _pipes_needed()
    process = subprocess.Popen(
        [sys.executable, "-c", _ENTRY, _ROOT, str(far.fileno()), str(os.getpid())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if 1 in pipes else None,
        stderr=subprocess.PIPE if 2 in pipes else None,
        pass_fds=[far.fileno()],
        env=for_zygote(),
        # Ctrl-C of a terminal reaches this process only, which passes it on once.
        process_group=0,
    )
    far.close()
    passed_on: list[int] = []
    try:
        with _passing_on(process, passed_on):
            with contextlib.suppress(BrokenPipeError):
                payload.send(Sender(near))
            frames, was_interrupted = _wait(process, Receiver(near), pipes)
    finally:
        _end(process)
        near.close()
    reply = _reply(frames, process)
    if was_interrupted:
        raise KeyboardInterrupt(reply.message if reply.code == 128 + signal.SIGINT else "")
    if passed_on and payload.script is None:
        # This process has no exit code of ours: it ends as it would have without a run.
        os.kill(os.getpid(), passed_on[0])
    return reply


def receive(descriptor: int) -> tuple[Payload, Sender]:
    """In the zygote: read the payload, and return the way back to the caller."""
    connection = socket.socket(fileno=descriptor)
    connection.set_inheritable(False)
    receiver = Receiver(connection)
    frames: list[Frame] = []
    with selectors.DefaultSelector() as selector:
        selector.register(receiver, selectors.EVENT_READ)
        while not frames or frames[-1].kind != "payload":
            if receiver.at_end:
                raise ConnectionError("The process that called launch() is gone.")
            selector.select()
            frames.extend(receiver.frames())
    connection.setblocking(True)
    return Payload.of_frames(frames), Sender(connection)


def _pipes_needed() -> dict[int, TextIO]:
    """The streams by which this process shows things, where those are not plainly descriptors 1 and 2."""
    needed: dict[int, TextIO] = {}
    for stream, text in ((1, sys.stdout), (2, sys.stderr)):
        if text is None:
            continue
        text.flush()
        try:
            is_plain = text.fileno() == stream
        except (OSError, ValueError, AttributeError):
            is_plain = False
        if not is_plain:
            needed[stream] = text
    return needed


def _wait(process: subprocess.Popen[bytes], receiver: Receiver, pipes: dict[int, TextIO]) -> tuple[list[Frame], bool]:
    """Show output and collect frames until the zygote is gone. Ctrl-C is passed on; returns whether there was any."""
    frames: list[Frame] = []
    was_interrupted = False
    sources = {1: process.stdout, 2: process.stderr}
    with selectors.DefaultSelector() as selector, _pidfd(process.pid) as ended:
        selector.register(ended, selectors.EVENT_READ, lambda: True)
        selector.register(receiver, selectors.EVENT_READ, lambda: _take(selector, receiver, frames))
        for stream, text in pipes.items():
            source = sources[stream]
            assert source is not None
            os.set_blocking(source.fileno(), False)
            selector.register(source, selectors.EVENT_READ, lambda s=source, t=text: _show(selector, s, t))
        has_ended = False
        while not has_ended:
            try:
                for event, _ in selector.select():
                    has_ended |= bool(event.data())
            except KeyboardInterrupt:
                was_interrupted = True
                process.send_signal(signal.SIGINT)
        for key in list(selector.get_map().values()):
            key.data()
    return frames, was_interrupted


def _take(selector: selectors.BaseSelector, receiver: Receiver, frames: list[Frame]) -> None:
    frames.extend(receiver.frames())
    if receiver.at_end:
        selector.unregister(receiver)


def _show(selector: selectors.BaseSelector, source: Any, text: TextIO) -> None:
    while True:
        try:
            data = os.read(source.fileno(), 1 << 16)
        except BlockingIOError:
            break
        if not data:
            selector.unregister(source)
            break
        text.write(data.decode(errors="replace"))
    text.flush()


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
        process.wait()
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()


def _reply(frames: list[Frame], process: subprocess.Popen[bytes]) -> Reply:
    for frame in frames:
        if frame.kind == "reply":
            info = frame.info
            return Reply(code=info["code"], message=info["message"], result=frame.blob if info["has_result"] else None)
    return Reply(
        code=1,
        message=f"samestep: the process that looks after the workers (pid {process.pid}) ended with code "
        f"{process.returncode} and gave no reason; a negative code is the number of the signal that killed it.",
    )


@contextlib.contextmanager
def _passing_on(process: subprocess.Popen[bytes], passed_on: list[int]) -> Iterator[None]:
    """Give signals that would end this process to the zygote, which ends the run in order; they are noted in a list.
    Ctrl-Z suspends the whole run, until this process is let go again.

    Where the user's process does something of its own at them, or this is not its main thread, that stays.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def pass_on(number: int, _: Any) -> None:
        passed_on.append(number)
        process.send_signal(number)

    def suspend(*_: Any) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGCONT)

    acts = {signal.SIGTERM: pass_on, signal.SIGHUP: pass_on, signal.SIGTSTP: suspend}
    mine = [n for n in acts if signal.getsignal(n) is signal.SIG_DFL]
    for number in mine:
        signal.signal(number, acts[number])
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def _pidfd(pid: int) -> Iterator[int]:
    descriptor = os.pidfd_open(pid)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
