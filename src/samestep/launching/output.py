"""Where the prints of workers go: the first worker's to the user, the others' into files without a name."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import tempfile
from dataclasses import dataclass
from typing import BinaryIO


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


class WorkerOutput:
    """Standard output and standard error of one worker, made before the fork.

    Attributes:
        pipes: reading ends by stream (1 or 2).
    """

    def __init__(self, rank: int, plumbing: Plumbing):
        self.rank = rank
        self.pipes: dict[int, int] = {}
        self._targets: dict[int, int] = {}
        self._file: BinaryIO | None = None
        # Of its own, so that the supervisor can read it without what the worker prints.
        self._stack = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  lives as long as the worker
        self._plumbing = plumbing
        if rank > 0 or plumbing.hidden:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  lives as long as the worker
        self._open_pipes()

    def again(self) -> None:
        """In the supervisor: be the output of the next worker in this place too. What was printed stays."""
        self._close_pipes()
        if self._file is not None:
            self._file.write(_content(self._stack))
        # Workers share the position in the file with this process.
        self._stack.seek(0)
        self._stack.truncate()
        self._open_pipes()

    def _open_pipes(self) -> None:
        if self._file is not None:
            return
        for stream, wanted in ((1, self._plumbing.pipe_stdout), (2, self._plumbing.pipe_stderr)):
            if wanted:
                self.pipes[stream], self._targets[stream] = os.pipe()
                os.set_blocking(self.pipes[stream], False)

    def enter(self) -> None:
        """In the forked worker: make this its output. Lines leave at once, so a killed worker loses none."""
        with contextlib.suppress(OSError, ValueError):
            faulthandler.enable(os.dup(self._stack.fileno()))
        unseen = {1: self._file.fileno(), 2: self._file.fileno()} if self._file is not None else {}
        for stream, target in (unseen or self._targets).items():
            os.dup2(target, stream)
        if self.rank > 0:
            nothing = os.open(os.devnull, os.O_RDONLY)
            os.dup2(nothing, 0)
            os.close(nothing)
        for text in (sys.stdout, sys.stderr):
            reconfigure = getattr(text, "reconfigure", None)
            if reconfigure is not None:
                reconfigure(line_buffering=True)

    def forked(self) -> None:
        """In the supervisor: keep only the reading ends."""
        for target in self._targets.values():
            os.close(target)
        self._targets = {}

    def read(self, stream: int) -> bytes:
        """Return what has arrived in a pipe, empty if nothing has."""
        parts = []
        try:
            while part := os.read(self.pipes[stream], 1 << 16):
                parts.append(part)
        except BlockingIOError:
            pass
        return b"".join(parts)

    def text(self) -> bytes:
        """Return all that went into the file, then the stack of a crash."""
        return (b"" if self._file is None else _content(self._file)) + _content(self._stack)

    def stack(self) -> str:
        """Return what faulthandler wrote when the worker crashed; empty if it did not."""
        return _content(self._stack).decode(errors="replace")

    def close(self) -> None:
        """Give back every descriptor of this process."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self._stack.close()
        self._close_pipes()

    def _close_pipes(self) -> None:
        for descriptor in (*self.pipes.values(), *self._targets.values()):
            os.close(descriptor)
        self.pipes, self._targets = {}, {}


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
