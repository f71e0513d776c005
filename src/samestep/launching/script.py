"""A user's script, run as `__main__` by path."""

from __future__ import annotations

import builtins
import importlib.util
import io
import os
import sys
import types
from dataclasses import dataclass

from samestep.errors import SettingsError


@dataclass(frozen=True, kw_only=True)
class Script:
    """A file to run, and what it finds in `sys.argv`.

    Attributes:
        path: the file.
        argv: all of `sys.argv`; the first is the script as the user wrote it.
        module: its name if it was started with `python -m`, else None.
    """

    path: str
    argv: tuple[str, ...]
    module: str | None = None

    def check(self) -> None:
        """Find out cheaply what would stop the script from starting.

        Raises:
            SettingsError: there is no such file, or it cannot be read.
            SyntaxError: it is not Python.
        """
        if os.path.isdir(self.path):
            raise SettingsError(f"{self.path} is a folder. Name the script in it, for example {self.path}/train.py.")
        try:
            self._code()
        except FileNotFoundError:
            raise SettingsError(f"There is no script {self.path}. Check the path; it is relative to here.") from None
        except OSError as error:
            raise SettingsError(
                f"The script {self.path} cannot be read: {error.strerror}. Check its permissions."
            ) from None
        except ValueError as error:
            if isinstance(error, SyntaxError):
                raise
            raise SettingsError(f"{self.path} is not a Python script: {error}.") from None

    def keep(self) -> None:
        """Keep the code as it is now: workers that this process forks later run it, even if the file is edited."""
        _kept[os.path.abspath(self.path)] = self._code()

    def run(self) -> None:
        """Run the file as `__main__` in this process.

        `sys.path[0]` becomes the script's folder, as under `python script.py`.
        """
        path = os.path.abspath(self.path)
        main = types.ModuleType("__main__")
        main.__file__ = path
        main.__dict__["__builtins__"] = builtins
        if self.module is not None:
            main.__spec__ = importlib.util.find_spec(self.module)
            main.__package__ = self.module.rpartition(".")[0]
        sys.modules["__main__"] = main
        sys.argv[:] = self.argv
        exec(self._code(), main.__dict__)

    def place_folder(self) -> None:
        """Put the script's folder first in `sys.path`, in the place of that of the program now running."""
        if sys.flags.safe_path:
            return
        folder = os.path.dirname(os.path.realpath(self.path))
        sys.path[:1] = [folder]

    def _code(self) -> types.CodeType:
        path = os.path.abspath(self.path)
        if path in _kept:
            return _kept[path]
        with io.open_code(path) as file:
            source = file.read()
        return compile(source, path, "exec", dont_inherit=True)


_kept: dict[str, types.CodeType] = {}
"""Scripts by absolute path, as they were when the run began."""


def of_this_process() -> Script | None:
    """Return the script that this process runs, None in a notebook, at a prompt, or under `python -c`."""
    if hasattr(sys, "ps1") or sys.flags.interactive:
        return None
    main = sys.modules.get("__main__")
    path = getattr(main, "__file__", None)
    if path is None or not os.path.isfile(path):
        return None
    spec = getattr(main, "__spec__", None)
    return Script(path=os.path.abspath(path), argv=tuple(sys.argv), module=spec.name if spec is not None else None)
