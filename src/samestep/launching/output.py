"""Where the prints of workers go: the first worker's to the user, the others' into files without a name."""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import io
import os
import sys
import tempfile
from dataclasses import dataclass
from typing import Any, BinaryIO, TextIO


@dataclass(frozen=True, kw_only=True)
class Plumbing:
    """What happens to the first worker's output.

    Attributes:
        pipe_stdout: read it, so that a status line can stay below it; else it goes straight to its place.
        pipe_stderr: likewise.
        hidden: keep it in a file like that of the others.
    """

    pipe_stdout: bool = False
    pipe_stderr: bool = False
    hidden: bool = False


class Outlet:
    """Where the first worker of a fleet prints, whoever that is; made before the forks.

    Attributes:
        pipes: reading ends by stream (1 or 2), of the streams that are read.
    """

    def __init__(self, plumbing: Plumbing):
        self.pipes: dict[int, int] = {}
        self._targets: dict[int, int] = {}
        self._is_hidden = plumbing.hidden
        for stream, wanted in ((1, plumbing.pipe_stdout), (2, plumbing.pipe_stderr)):
            if wanted and not plumbing.hidden:
                self.pipes[stream], self._targets[stream] = os.pipe()
                os.set_blocking(self.pipes[stream], False)

    def duplicates(self) -> dict[int, int]:
        """In a forked worker: return descriptors to print to, by stream; none where prints are hidden."""
        if self._is_hidden:
            return {}
        return {stream: os.dup(self._targets.get(stream, stream)) for stream in (1, 2)}

    def read(self, stream: int) -> bytes:
        """Return what has arrived in a pipe, empty if nothing has."""
        parts = []
        with contextlib.suppress(BlockingIOError):
            while part := os.read(self.pipes[stream], 1 << 16):
                parts.append(part)
        return b"".join(parts)

    def close(self) -> None:
        """Give back every descriptor of this process."""
        for descriptor in (*self.pipes.values(), *self._targets.values()):
            os.close(descriptor)
        self.pipes, self._targets = {}, {}


class _Outlived(io.FileIO):
    """A stream whose reader may end first: Ctrl-C ends `tee` too, a terminal is closed. Then prints are dropped, since
    the step in which one is made is to be finished, and kept."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            return memoryview(data).nbytes


def _lasting(text: TextIO, stream: int) -> TextIO:
    """Return a text stream to descriptor `stream`, of the same kind as `text`, whose lines leave at once."""
    if not isinstance(text, io.TextIOWrapper):
        return text
    # A library that was imported before may hold it.
    text.reconfigure(line_buffering=True)
    raw = _Outlived(stream, "w", closefd=False)
    # Under `python -u` there is no buffer.
    buffer: Any = raw if text.write_through else io.BufferedWriter(raw)
    return io.TextIOWrapper(buffer, text.encoding, text.errors, line_buffering=True, write_through=text.write_through)


class WorkerOutput:
    """Standard output and standard error of the workers in one slot, made before the fork."""

    def __init__(self, rank: int):
        self.rank = rank
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  lives as long as the worker
        # Of its own, so that the supervisor can read it without what the worker prints.
        self._stack = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  lives as long as the worker
        self._shown: dict[int, int] = {}
        self._marks: list[tuple[int, int]] = [(0, 0)]

    def again(self) -> None:
        """In the supervisor: be the output of the next worker in this slot too. What was printed stays."""
        self._file.write(_content(self._stack))
        # Workers share the position in the file with this process.
        self._stack.seek(0)
        self._stack.truncate()

    def enter(self, outlet: Outlet, is_first: bool) -> None:
        """In the forked worker: make this its output. Lines leave at once, so a killed worker loses none.

        Args:
            outlet: where the first worker prints.
            is_first: this is the first; what others print is kept unseen.
        """
        with contextlib.suppress(OSError, ValueError):
            faulthandler.enable(os.dup(self._stack.fileno()))
        self._shown = outlet.duplicates()
        unseen = dict.fromkeys((1, 2), self._file.fileno())
        for stream, target in (self._shown if is_first and self._shown else unseen).items():
            os.dup2(target, stream)
        if not is_first:
            nothing = os.open(os.devnull, os.O_RDONLY)
            os.dup2(nothing, 0)
            os.close(nothing)
        sys.stdout, sys.stderr = _lasting(sys.stdout, 1), _lasting(sys.stderr, 2)

    def mark(self, num_calls: int) -> None:
        """In a worker that is not the first: so many calls are recorded, and so much is printed."""
        _flush()
        self._marks = [*self._marks[-1:], (num_calls, os.lseek(self._file.fileno(), 0, os.SEEK_CUR))]

    def take_over(self, num_calls: int) -> None:
        """In the forked worker: print to where the first did, which is gone, and what it may not have printed.

        Args:
            num_calls: calls that it had recorded. What comes after the last of them may be printed twice, never missed.
        """
        _flush()
        start = next((at for number, at in reversed(self._marks) if number <= num_calls), self._marks[0][1])
        for stream, target in self._shown.items():
            os.dup2(target, stream)
        if self._shown and (text := _content(self._file)[start:]):
            with contextlib.suppress(OSError):
                os.write(1, text)

    def text(self) -> bytes:
        """Return all that went into the file, then the stack of a crash."""
        return _content(self._file) + _content(self._stack)

    def stack(self) -> str:
        """Return what faulthandler wrote when the worker crashed; empty if it did not."""
        return _content(self._stack).decode(errors="replace")

    def close(self) -> None:
        """Give back every descriptor of this process."""
        self._file.close()
        self._stack.close()


class Muted:
    """Drops what this process prints, until `end`: the caller's process has shown it before."""

    def __init__(self) -> None:
        _flush()
        self._kept = {stream: os.dup(stream) for stream in (1, 2)}
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in self._kept:
            os.dup2(nowhere, stream)
        os.close(nowhere)

    def end(self) -> None:
        """Print again. Calling it twice does no harm."""
        _flush()
        for stream, kept in self._kept.items():
            os.dup2(kept, stream)
            os.close(kept)
        self._kept = {}


def keep(outputs: list[WorkerOutput], folder: str | None) -> str | None:
    """Write what workers printed unseen into files.

    Args:
        outputs: of all workers.
        folder: the run's folder; None makes a private one.

    Returns:
        The folder that holds `worker-K.txt`, None if nothing was printed.
    """
    texts = {output.rank: text for output in outputs if (text := output.text())}
    if not texts:
        return None
    if folder is None:
        place = tempfile.mkdtemp(prefix="samestep-output-")
    else:
        place = os.path.join(folder, "output")
        os.makedirs(place, exist_ok=True)
    for rank, text in texts.items():
        with open(os.path.join(place, f"worker-{rank}.txt"), "wb") as file:
            file.write(text)
    return place


def _content(file: BinaryIO) -> bytes:
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
