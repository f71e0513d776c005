"""The one error that a user sees when a run fails."""

from __future__ import annotations

import os
import signal
import traceback
from dataclasses import asdict, dataclass
from typing import Any

from samestep.errors import IntegrityError, PeerError, SamestepError
from samestep.guarding.crash import Crash

SETTINGS_CODE = 2
"""Exit code where settings clash, so that the run did not begin."""

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What went wrong, once.

    Attributes:
        kind: class name of the error; empty when a worker died without one.
        message: one sentence or more, for the user.
        traceback: the user's frames and the error itself; may be empty.
        rank: the worker it happened in; None where that says nothing.
        code: exit code of the run.
        of_samestep: the message is samestep's own, so it stands on its own.
        of_peer: the failure only says that another worker is gone.
        may_pass: it may not come again: of the operating system, of memory, of a device, a flipped bit.
    """

    kind: str = ""
    message: str
    traceback: str = ""
    rank: int | None = None
    code: int = 1
    of_samestep: bool = False
    of_peer: bool = False
    may_pass: bool = False

    @classmethod
    def of(cls, error: BaseException, rank: int | None = None, code: int = 1) -> Failure:
        """Describe an exception, without the frames of samestep."""
        return cls(
            kind=type(error).__name__,
            message=str(error),
            traceback=_users_traceback(error),
            rank=rank,
            code=code,
            of_samestep=isinstance(error, SamestepError),
            of_peer=isinstance(error, PeerError),
            may_pass=_may_pass(error),
        )

    @classmethod
    def of_exit(cls, rank: int, pid: int, status: int, crash: Crash | None = None) -> Failure:
        """Describe a worker that ended with wait status `status` and left no error of its own.

        Args:
            rank: the worker.
            pid: its.
            status: as `os.waitpid` gives it.
            crash: what is known of its end.
        """
        if not os.WIFSIGNALED(status):
            return cls(
                message=f"Worker {rank} (pid {pid}) ended with exit code {os.waitstatus_to_exitcode(status)} and gave "
                "no reason; something in it called os._exit."
            )
        name = signal.Signals(os.WTERMSIG(status)).name
        crash = crash if crash is not None else Crash()
        frames: list[traceback.FrameSummary] = []
        if name == "SIGKILL" and crash.by_kernel:
            return cls(
                message=f"Worker {rank} (pid {pid}) was killed by the kernel for want of memory: use more replicas "
                "(smaller shards), fewer workers or a smaller model."
            )
        if name == "SIGKILL":
            why = (
                "if nobody did that by hand, the machine ran out of memory (the kernel's log tells). Use a smaller "
                "batch or fewer workers."
            )
        elif name in ("SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE", "SIGABRT"):
            frames = crash.users_frames
            why = _why_crashed(crash)
        else:
            why = "somebody, or something, sent it that signal."
        return cls(
            message=f"Worker {rank} (pid {pid}) was killed by {name}: {why}",
            traceback="".join(traceback.format_list(frames)),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain facts, for a channel."""
        return asdict(self)

    def is_same_as(self, other: Failure) -> bool:
        """Whether two workers had the same error."""
        return (self.kind, self.message) == (other.kind, other.message)

    def text(self, ranks: list[int] | None = None) -> str:
        """Return what to print: the user's traceback first, samestep's word last.

        Args:
            ranks: all workers that had this error; default the one it came from.
        """
        ranks = ranks if ranks else ([] if self.rank is None else [self.rank])
        lines = [self.traceback.rstrip()] if self.traceback else []
        if self.of_samestep or not self.kind:
            lines.append(f"samestep: {self.message}")
        else:
            where = f" in {_workers_in_words(ranks)}" if ranks else ""
            lines.append(f"samestep: the error above happened{where}; the run has ended.")
        return "\n".join(lines)


def _may_pass(error: BaseException) -> bool:
    """Return whether it is worth while to try again, after an error of the script or of its data."""
    if isinstance(error, IntegrityError):
        return True
    if isinstance(error, SamestepError):
        return error.__cause__ is not None and _may_pass(error.__cause__)
    return isinstance(error, OSError | MemoryError | RuntimeError) and not isinstance(
        error, NotImplementedError | RecursionError
    )


def _why_crashed(crash: Crash) -> str:
    at = f" at {crash.where}" if crash.where else ""
    if crash.wrote_protected or crash.wrote_probably:
        wrote = "it wrote" if crash.wrote_protected else "it probably wrote"
        otherwise = "" if crash.wrote_protected else " If nothing is written there, native code crashed."
        return (
            f"{wrote} to the weights outside of update{at}; they are read-only then under `samestep verify`. Workers "
            "share one copy of the weights, so such an edit would happen once per worker. Put it into `with "
            f"run.edit():`, where it happens once, and make views of weights (NumPy's too) inside it.{otherwise}"
        )
    return (
        f"native code crashed{at}: torch, or an extension the script uses. Its stack is in that worker's output, at "
        "the end."
    )


def _workers_in_words(ranks: list[int]) -> str:
    names = [str(rank) for rank in sorted(ranks)]
    if len(names) == 1:
        return f"worker {names[0]}"
    return f"workers {', '.join(names[:-1])} and {names[-1]}"


def _users_traceback(error: BaseException) -> str:
    summary = traceback.TracebackException.from_exception(error)
    if isinstance(error, SamestepError):
        return _around(summary)
    if not (summary.stack and _is_ours(summary.stack[-1])):
        _trim(summary)
    return "".join(summary.format())


def _around(summary: traceback.TracebackException) -> str:
    """The cause that came from the user's code, if any, then the user's line that called samestep."""
    cause = summary.__cause__
    text = ""
    if cause is not None:
        _trim(cause)
        text = "".join(cause.format()) + "\n"
    _trim(summary)
    if summary.stack:
        text += "".join(traceback.StackSummary.from_list([summary.stack[-1]]).format())
    return text


def _trim(summary: traceback.TracebackException) -> None:
    for part in (summary, *(getattr(summary, "exceptions", None) or ())):
        users = [frame for frame in part.stack if not _is_ours(frame)]
        part.stack = traceback.StackSummary.from_list(users)
        for linked in (part.__cause__, part.__context__):
            if linked is not None:
                _trim(linked)


def _is_ours(frame: traceback.FrameSummary) -> bool:
    return frame.filename.startswith(_PACKAGE) or frame.filename.startswith("<frozen importlib")
