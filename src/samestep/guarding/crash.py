"""What is known of a worker that died in native code: the stack that faulthandler wrote, and what the group noted."""

from __future__ import annotations

import os
import re
import sys
import sysconfig
import traceback
from dataclasses import dataclass

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_LIBRARIES = re.compile(r"[/\\](site|dist)-packages[/\\]")
_FRAME = re.compile(r'  File "(?P<file>.*)", line (?P<line>\d+) in (?P<function>.*)')


@dataclass(frozen=True, kw_only=True)
class Crash:
    """One worker's death.

    Attributes:
        dump: what faulthandler wrote; empty if it did not.
        wrote_protected: whether the worker had written to memory that was read-only for it; None: it may have.
        by_kernel: the kernel killed a process for want of memory meanwhile.
    """

    dump: str = ""
    wrote_protected: bool | None = False
    by_kernel: bool = False

    @property
    def users_frames(self) -> list[traceback.FrameSummary]:
        """The user's frames in the thread that crashed, outermost first: without samestep, torch, other libraries."""
        return [frame for frame in reversed(self._frames()) if not _is_ours(frame) and not _is_library(frame)]

    @property
    def where(self) -> str:
        """The user's innermost line, as "train.py:40"; empty if there is none."""
        frames = self.users_frames
        return f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else ""

    @property
    def wrote_probably(self) -> bool:
        """Whether it is not known what the crash was, but user code, not samestep, was under way."""
        inner = next((frame for frame in self._frames() if not _is_library(frame)), None)
        return self.wrote_protected is None and inner is not None and not _is_ours(inner)

    def _frames(self) -> list[traceback.FrameSummary]:
        """The frames of the thread that crashed, innermost first."""
        # A child of the worker may have crashed before and told so in the same file.
        _, _, dump = self.dump.rpartition("Fatal Python error")
        _, _, stack = dump.partition("\nCurrent thread ")
        frames = []
        for text in stack.splitlines()[1:]:
            match = _FRAME.fullmatch(text)
            if match is None:
                break
            frames.append(traceback.FrameSummary(match["file"], int(match["line"]), match["function"]))
        return frames


def _is_ours(frame: traceback.FrameSummary) -> bool:
    return frame.filename.startswith((_PACKAGE, "<frozen "))


def _is_library(frame: traceback.FrameSummary) -> bool:
    return bool(_LIBRARIES.search(frame.filename)) or frame.filename.startswith(_library_folders())


def _library_folders() -> tuple[str, ...]:
    """The standard library, and torch where it is built in place."""
    folders = [sysconfig.get_path("stdlib")]
    torch = getattr(sys.modules.get("torch"), "__file__", None)
    if torch:
        folders.append(os.path.dirname(torch))
    return tuple(folder + os.sep for folder in folders)
