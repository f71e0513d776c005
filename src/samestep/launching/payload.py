"""What a caller's process sends to the zygote it starts: a script by path, or a function by value."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import cloudpickle  # type: ignore[import-untyped]

from samestep.errors import SettingsError
from samestep.launching.channel import Frame, Sender
from samestep.launching.script import Script, of_this_process


@dataclass(frozen=True, kw_only=True)
class Payload:
    """One launch call, made outside of any worker.

    Attributes:
        num_workers: how many to start.
        options: settings, as plain facts.
        script: the file that holds the function; None where the function travels by value.
        function: the function by cloudpickle; empty where the script is run again.
        earlier: results of the launch calls that this process made before.
        sys_path: where workers look for modules.
    """

    num_workers: int
    options: dict[str, Any]
    script: Script | None = None
    function: bytes = b""
    earlier: tuple[bytes, ...] = ()
    sys_path: tuple[str, ...] = ()

    def send(self, sender: Sender) -> None:
        """Send everything, ending with the frame "payload"."""
        for result in self.earlier:
            sender.send("earlier", blob=result)
        info = {
            "num_workers": self.num_workers,
            "options": self.options,
            "script": asdict(self.script) if self.script is not None else None,
            "sys_path": list(self.sys_path),
        }
        sender.send("payload", info, self.function)

    @classmethod
    def of_frames(cls, frames: Iterable[Frame]) -> Payload:
        """Put together what `send` sent."""
        *earlier, last = frames
        script = last.info["script"]
        return cls(
            num_workers=last.info["num_workers"],
            options=last.info["options"],
            script=Script(path=script["path"], argv=tuple(script["argv"]), module=script["module"]) if script else None,
            function=last.blob,
            earlier=tuple(frame.blob for frame in earlier),
            sys_path=tuple(last.info["sys_path"]),
        )


def script_of(function: Callable[..., Any]) -> Script | None:
    """Return this process's script if `function` comes from it, so that workers can run it again by path."""
    while isinstance(function, functools.partial):
        function = function.func
    home = getattr(function, "__module__", None) or type(function).__module__
    return of_this_process() if home == "__main__" else None


def absolute_sys_path() -> tuple[str, ...]:
    """Return `sys.path` so that it means the same in a process that was started in another way."""
    return tuple(os.path.abspath(entry) for entry in sys.path)


def by_value(function: Callable[..., Any]) -> bytes:
    """Return `function` as bytes, with what it closes over.

    Raises:
        SettingsError: something in it cannot be sent; the message names it.
    """
    try:
        return cloudpickle.dumps(function)
    except Exception as error:
        culprit = _culprit(function)
        what = f"it uses {culprit}, which" if culprit else f"{function!r} holds something that"
        raise SettingsError(
            f"The function given to launch() cannot be sent to workers: {what} cannot be pickled ({error}). Create it "
            "inside the function, or put the code into a script and start that with `samestep run`."
        ) from None


def from_value(blob: bytes) -> Callable[..., Any]:
    """Return the function that `by_value` packed."""
    return cloudpickle.loads(blob)


def _culprit(function: Callable[..., Any]) -> str | None:
    """Name the first variable that the function uses and that cannot be pickled."""
    inner = inspect.unwrap(function.func if isinstance(function, functools.partial) else function)
    try:
        used = inspect.getclosurevars(inner)
    except (TypeError, ValueError):
        return None
    for name, value in {**used.nonlocals, **used.globals}.items():
        try:
            cloudpickle.dumps(value)
        except Exception:
            return f"`{name}` ({type(value).__module__}.{type(value).__qualname__})"
    return None
