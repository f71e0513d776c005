"""Memory of this machine: what a process holds, what is left, and whether something will fit.

Figures come from Linux' /proc and control groups. Elsewhere they are None, and `check_fits` lets everything pass.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path

from samestep.errors import SettingsError
from samestep.units import bytes_in_words, count_in_words

_ROOT = Path("/")
_SHORT = ("can't allocate memory", "not enough memory", "out of memory", "cannot allocate memory")
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _NEVER = -1, -4, -1
"""Of glibc's <malloc.h>."""


def pss_bytes(pid: int | str = "self", root: Path = _ROOT) -> int | None:
    """Return the memory that a process holds, in bytes; what n processes share counts 1/n for each.

    So the sum over the workers of a run is what the run takes from the machine.

    Args:
        pid: a process id, or "self".
        root: where proc is mounted (another place in tests).

    Returns:
        The proportional set size; None where the system does not tell (not Linux, or the process is gone).
    """
    return _kib_field(root / "proc" / str(pid) / "smaps_rollup", "Pss")


def give_back() -> None:
    """Return freed memory to the system. The C library keeps it otherwise, and a fleet pays once per worker."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def keep_freed() -> None:
    """Let this process keep the memory it frees, to use it again, until `give_back`.

    The C library hands large blocks back at once. Autograd frees and takes the memory of activations and gradients in
    every step, so the kernel would map and clear the same pages in every step: a third of the time of a step of wide
    layers (docs/decisions/007). Does nothing where the C library is not glibc.
    """
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, _NEVER)


def available_bytes(root: Path = _ROOT) -> int | None:
    """Return how many bytes can still be allocated without swapping or meeting a container's limit.

    It is the least of the kernel's estimate and, for every control group (v1 or v2) that this process is in, its limit
    less its usage; file cache that the group can drop does not count as used.

    Args:
        root: where proc and sys are mounted (another place in tests).

    Returns:
        Bytes, at least 0; None where the system does not tell.
    """
    found = [_kib_field(root / "proc" / "meminfo", "MemAvailable"), *_left_in_groups(root)]
    known = [num_bytes for num_bytes in found if num_bytes is not None]
    return max(0, min(known)) if known else None


def shortage_behind(error: BaseException) -> str:
    """Return a sentence on how much memory there is, if `error` says that it was not enough; else nothing."""
    said = str(error).lower()
    if not isinstance(error, MemoryError) and not any(words in said for words in _SHORT):
        return ""
    held, left = pss_bytes(), available_bytes()
    known = [f"this worker holds {_in_words(held)}"] if held is not None else []
    known += [f"{_in_words(left)} are available"] if left is not None else []
    return f"memory ran out: {', '.join(known)}. Use more replicas (smaller shards), fewer workers or a smaller model."


def num_oom_kills(root: Path = _ROOT) -> int:
    """Return how often the kernel has killed a process for want of memory: in this container, else on this machine."""
    for path, field in (("sys/fs/cgroup/memory.events", "oom_kill"), ("proc/vmstat", "oom_kill")):
        for line in _text(root / path).splitlines():
            name, _, value = line.partition(" ")
            if name == field and value.strip().isdigit():
                return int(value)
    return 0


def check_fits(num_bytes: int, what: str, root: Path = _ROOT) -> None:
    """Check that an allocation will fit into memory.

    Args:
        num_bytes: size of the allocation.
        what: what it is for, as the subject of a sentence: "The arena of 4 workers".
        root: where proc and sys are mounted (another place in tests).

    Raises:
        SettingsError: it will not fit.
    """
    left = available_bytes(root)
    if left is not None and num_bytes > left:
        raise SettingsError(
            f"{what} needs {_in_words(num_bytes)} of memory, but only {_in_words(left)} are available on this machine "
            f"(or in this container). Use fewer workers or a smaller model, free memory, or raise the container's "
            f"limit."
        )


def _left_in_groups(root: Path) -> Iterator[int | None]:
    for line in _text(root / "proc" / "self" / "cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            for mount in ("sys/fs/cgroup", "sys/fs/cgroup/unified"):
                for group in _group_and_parents(root / mount, path):
                    yield _left(group, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            for group in _group_and_parents(root / "sys/fs/cgroup/memory", path):
                yield _left(group, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _group_and_parents(mount: Path, path: str) -> Iterator[Path]:
    """Yield a group's folder and those above it. A container may see its own group as the mount itself."""
    parts = [part for part in path.split("/") if part not in ("", "..")]
    for depth in range(len(parts), -1, -1):
        yield mount.joinpath(*parts[:depth])


def _left(group: Path, limit_file: str, usage_file: str, droppable_field: str) -> int | None:
    limit, usage = _text(group / limit_file).strip(), _text(group / usage_file).strip()
    if not (limit.isdigit() and usage.isdigit()):
        return None
    droppable = 0
    for line in _text(group / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name == droppable_field and value.strip().isdigit():
            droppable = int(value)
    return int(limit) - max(0, int(usage) - droppable)


def _kib_field(path: Path, name: str) -> int | None:
    for line in _text(path).splitlines():
        field, _, value = line.partition(":")
        words = value.split()
        if field == name and words and words[0].isdigit():
            return int(words[0]) * 1024
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _in_words(num_bytes: int) -> str:
    return f"{bytes_in_words(num_bytes)} ({count_in_words(num_bytes)} bytes)"
