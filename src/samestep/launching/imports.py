"""Libraries that a script imports, imported by the zygote too, so that a fleet which starts again need not.

A worker tells which installed libraries the script has loaded. A child tries first: what starts a thread on import,
fails or takes very long would spoil the zygote, and is left to the workers. The own files of a script are not imported.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import sysconfig
import time
from collections.abc import Collection, Sequence

from samestep.launching import zygote
from samestep.launching.output import Muted

MOST_SECONDS = 5.0
"""Of imports that the supervisor makes itself; meanwhile it hears nothing."""


def learned(known: Collection[str]) -> list[str]:
    """Return the installed modules that this process has imported, in order, but for those in `known`."""
    paths = sysconfig.get_paths()
    roots = tuple({os.path.join(paths[name], "") for name in ("stdlib", "platstdlib", "purelib", "platlib")})
    return [
        name
        for name, module in list(sys.modules.items())
        if name not in known and name != "__main__" and _origin(module).startswith(roots)
    ]


def try_in_child(names: Sequence[str]) -> int:
    """Fork a child that imports `names`; its exit code is 0 if this process may do the same. Returns its pid."""
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        zygote.die_with(parent)
        os.nice(19)
        begin = time.process_time()
        take(names)
        zygote.check_one_task()
        code = 0 if time.process_time() - begin < MOST_SECONDS else 1
    except BaseException:
        code = 1
    finally:
        os._exit(code)


def take(names: Sequence[str]) -> None:
    """Import `names`; what they print is dropped, and one that fails is left out."""
    muted = Muted()
    try:
        for name in names:
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    finally:
        muted.end()


def _origin(module: object) -> str:
    spec = getattr(module, "__spec__", None)
    return str(getattr(spec, "origin", None) or "")
