"""Stands between a save and the system: every call that a save makes can be counted, failed, cut short or killed at."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from typing import Any

CALLS = {
    os: ("open", "write", "fsync", "close", "mkdir", "rename", "unlink", "rmdir", "listdir", "scandir"),
    fcntl: ("flock",),
}
"""All that `samestep.storage.checkpoint` changes a disk by, or looks at it with."""

CHANGES = {"mkdir", "write", "fsync", "rename", "unlink", "rmdir"}
ALLOCATES = {"mkdir", "write", "fsync", "rename"}
"""What a full disk refuses; deleting goes on."""

Hook = Callable[[str, Callable, tuple, dict], Any]
"""Takes a call's name, the real function and its arguments; returns what the call shall return."""


@contextlib.contextmanager
def intercepted(hook: Hook) -> Iterator[None]:
    """Let every system call of a save go through `hook`."""

    def wrapper(name: str, real: Callable) -> Callable:
        return lambda *args, **kwargs: hook(name, real, args, kwargs)

    before = [(module, name, getattr(module, name)) for module, names in CALLS.items() for name in names]
    for module, name, real in before:
        setattr(module, name, wrapper(name, real))
    try:
        yield
    finally:
        for module, name, real in before:
            setattr(module, name, real)


def is_creating(name: str, args: tuple) -> bool:
    """Whether this is an `open` that may make a file."""
    return name == "open" and bool(args[1] & os.O_CREAT)


class Failing:
    """Fails the `index`-th call (from 0), and with `sticky` every later one that a disk in that state refuses.

    Attributes:
        calls: names of the calls made so far.
        failed: name of the call that failed first, or "".
    """

    def __init__(self, index: int, code: int, sticky: bool, refused: set[str]):
        self.calls: list[str] = []
        self.failed = ""
        self._index, self._code, self._sticky, self._refused = index, code, sticky, refused

    def __call__(self, name: str, real: Callable, args: tuple, kwargs: dict) -> Any:
        """Play one call."""
        number = len(self.calls)
        self.calls.append(name)
        refuses = name in self._refused or is_creating(name, args)
        if number == self._index or (self._sticky and number > self._index and refuses):
            if name == "close":
                real(*args)  # as Linux does: the descriptor is gone, whatever close returns
            self.failed = self.failed or name
            raise OSError(self._code, os.strerror(self._code))
        return real(*args, **kwargs)


class Short:
    """Lets the `index`-th write (from 0) take only the first `share` of its bytes, and with `code` the next one fail.

    Attributes:
        num_writes: so far.
        failed: "write" if one failed, or "".
    """

    def __init__(self, index: int, share: float, code: int | None = None):
        self.num_writes = 0
        self.failed = ""
        self._index, self._share, self._code = index, share, code

    def __call__(self, name: str, real: Callable, args: tuple, kwargs: dict) -> Any:
        """Play one call."""
        if name != "write":
            return real(*args, **kwargs)
        number, self.num_writes = self.num_writes, self.num_writes + 1
        if number == self._index:
            part = memoryview(args[1])[: int(len(args[1]) * self._share)]
            return real(args[0], part)
        if number == self._index + 1 and self._code is not None:
            self.failed = "write"
            raise OSError(self._code, os.strerror(self._code))
        return real(*args, **kwargs)
