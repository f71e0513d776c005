"""The runs that live on this host: where they can be found, and how a command speaks with one.

Each has a socket in a folder that only its user may enter: $XDG_RUNTIME_DIR/samestep, or samestep-UID in the folder for
temporary files. A run removes its own; one that was killed leaves a socket that nobody answers, which `live` removes.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from samestep.errors import SettingsError, WorkerError
from samestep.launching import request

_SUFFIX = ".run"
_NAME_CHARS = 40
_TRIES = 10
_ASK_SECONDS = 2.0


def folder_path() -> str:
    """Return where the sockets of this user's runs are."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isdir(runtime):
        return os.path.join(runtime, "samestep")
    return os.path.join(tempfile.gettempdir(), f"samestep-{os.getuid()}")


def name_of(title: str) -> str:
    """Return the name of a run of this process."""
    stem = re.sub(r"[^\w.-]", "_", os.path.splitext(title)[0], flags=re.ASCII).lstrip(".")[:_NAME_CHARS]
    return f"{stem or 'run'}-{os.getpid()}"


def bind(name: str) -> socket.socket:
    """Return a listening socket for the run `name`.

    Raises:
        OSError: there is no place for it, or others can enter that place.
    """
    for left in reversed(range(_TRIES)):
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with _folder(make=True) as place:
                listener.bind(f"{place}/{name}{_SUFFIX}")
            listener.listen(8)
            listener.setblocking(False)
            return listener
        except FileNotFoundError:
            # A run that ended removed the folder, which was empty for a moment.
            listener.close()
            if not left:
                raise
        except BaseException:
            listener.close()
            raise
    raise AssertionError("unreachable")


def remove(name: str) -> None:
    """Remove the socket of a run, and the folder if it was the last one."""
    with contextlib.suppress(OSError), _folder(make=False) as place:
        os.unlink(f"{place}/{name}{_SUFFIX}")
    with contextlib.suppress(OSError):
        os.rmdir(folder_path())


def live() -> list[dict[str, Any]]:
    """Return what each live run says of itself, by name; sockets of dead ones are removed.

    A run that lives but does not answer is listed by its name alone.
    """
    found = []
    for name in _names():
        try:
            found.append({"name": name, **ask(name, {"ask": "status"}, _ASK_SECONDS)})
        except ConnectionRefusedError:
            remove(name)
        except (FileNotFoundError, ConnectionError):
            continue  # It ended just now.
        except (OSError, WorkerError):
            found.append({"name": name})
    return found


def find(prefix: str) -> str:
    """Return the name of the one live run whose name begins with `prefix`.

    Raises:
        SettingsError: there is none, or there are several.
    """
    names = [run["name"] for run in live()]
    fitting = [name for name in names if name.startswith(prefix)]
    if prefix in fitting:
        return prefix
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise SettingsError(f"You named the run {prefix!r}, but {', '.join(fitting)} all begin so. Give more of it.")
    there = f"These do: {', '.join(names)}." if names else "None runs here."
    raise SettingsError(f"You named the run {prefix!r}, but no run of yours has a name that begins so. {there}")


def ask(name: str, facts: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Send a request to a run, and return its answer.

    Args:
        name: of the run.
        facts: the request.
        seconds: how long to wait for the answer.

    Raises:
        TimeoutError: there is no answer yet.
        OSError: the run is gone.
        SettingsError: the run refuses what was asked.
        WorkerError: the run cannot do it.
    """
    deadline = time.monotonic() + seconds
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(min(seconds, _ASK_SECONDS))
        with _folder(make=False) as place:
            connection.connect(f"{place}/{name}{_SUFFIX}")
        connection.sendall(request.packed(facts))
        data, answer = b"", None
        while answer is None:
            connection.settimeout(max(0.001, deadline - time.monotonic()))
            part = connection.recv(request.FRAME_BYTES)
            if not part:
                raise ConnectionError("The run ended before it answered.")
            data += part
            answer = request.unpacked(data)
    if answer.get("error"):
        raise (SettingsError if answer.get("refused") else WorkerError)(str(answer["error"]))
    return answer


@contextlib.contextmanager
def _folder(make: bool) -> Iterator[str]:
    """Give a short path to the private folder (a socket's path has room for 107 bytes).

    Raises:
        OSError: it is not there, or not this user's alone.
    """
    path = folder_path()
    if make:
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        facts = os.fstat(descriptor)
        if facts.st_uid != os.getuid() or stat.S_IMODE(facts.st_mode) & 0o077:
            raise PermissionError(f"{path} is not a folder that only you may enter; remove it, or its permissions")
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def _names() -> list[str]:
    try:
        with _folder(make=False) as place:
            return sorted(f.removesuffix(_SUFFIX) for f in os.listdir(place) if f.endswith(_SUFFIX))
    except OSError:
        return []
