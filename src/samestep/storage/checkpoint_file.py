"""One file of a checkpoint: new, whole and on the disk when written; distrusted when read."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from samestep.errors import CheckpointError, StorageError
from samestep.storage.digest import DIGEST_CHARS

MAX_JSON_BYTES = 1 << 28
"""A longer manifest or header is not believed."""

_ADVICE = {
    **dict.fromkeys(("ENOSPC", "EDQUOT", "EFBIG"), "Free space there: by hand, never a step-... that is still needed."),
    **dict.fromkeys(("EACCES", "EPERM"), "Give this user the right to write there."),
    "EROFS": "Mount it writable again; a system that made it read-only by itself has seen the disk fail.",
}


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Callable[[bytes | memoryview], None]]:
    """Make a file and yield what writes to its end; after the `with` block it is whole and on the disk.

    Raises:
        OSError: it is not.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        yield functools.partial(_write_all, descriptor)
        os.fsync(descriptor)
    except BaseException:
        with contextlib.suppress(OSError):
            os.close(descriptor)
        raise
    # Not suppressed: some file systems say only here that the disk, or a quota, is full.
    os.close(descriptor)


def _write_all(descriptor: int, content: bytes | memoryview) -> None:
    rest = memoryview(content)
    while rest:
        num_written = os.write(descriptor, rest)
        if num_written == 0:
            raise OSError(errno.EIO, "The file takes no more bytes")
        rest = rest[num_written:]


def sync_folder(folder: Path) -> None:
    """Put a folder's names on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems have no fsync for folders; their renames are as durable as they get.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def opened(path: Path, max_bytes: int) -> Iterator[tuple[io.BufferedReader, int]]:
    """Open a file of the checkpoint; yield it and its size. Whatever goes wrong inside becomes a CheckpointError."""
    try:
        # A pipe in a file's place must not block.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise damaged(path, "it is not a regular file")
            if status.st_size > max_bytes:
                raise damaged(path, f"it has {status.st_size} bytes, more than {max_bytes}")
            yield file, status.st_size
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        raise damaged(path, "it is missing" if missing else f"it cannot be read ({error})") from error
    except CheckpointError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise damaged(path, f"it cannot be understood ({error})") from error


def damaged(path: Path, what: str) -> CheckpointError:
    """Return the error that names a file and what is wrong with it."""
    return CheckpointError(f"The checkpoint file {path} is damaged: {what}.")


def storage_error(what: str, error: OSError, meanwhile: str = "") -> StorageError:
    """Return the error of a disk that fails.

    Args:
        what: could not be done; without a full stop.
        error: by the system.
        meanwhile: a sentence on what that leaves.
    """
    code = errno.errorcode.get(error.errno or 0, "")
    reason = f"{error.strerror or error}{f' ({code})' if code else ''}"
    advice = _ADVICE.get(code, "Look at the disk, and at what the system's log says of it.")
    return StorageError(" ".join(filter(None, [f"{what}: {reason}.", meanwhile, advice])), reason)


def bytes_digest(content: bytes) -> str:
    """Return the digest of bytes that are no tensor."""
    return hashlib.sha256(content).hexdigest()[:DIGEST_CHARS]


def natural(value: Any) -> int:
    """Return `value` if a file may give it as a size or count.

    Raises:
        ValueError: it is none.
    """
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{value!r} is not a size or count")
    return value
