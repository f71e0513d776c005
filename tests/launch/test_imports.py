"""What a script imports is taken over by the zygote, unless that would spoil it."""

import contextlib
import importlib
import io
import os
import select
import subprocess
import sys
from pathlib import Path

import samestep
from samestep.launching.imports import PATIENCE, Imports, learned

TAKES = """
import select, sys
from samestep.launching.imports import Imports
imports = Imports()
imports.hear(sys.argv[1:], 0.0)
trial = imports.due(0.0, has_died=True)
select.select([trial], [], [])
imports.tried()
print([name for name in sys.argv[1:] if name in sys.modules])
"""


def test_only_installed_modules_that_are_new_are_told(tmp_path, monkeypatch):
    (tmp_path / "of_the_user.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    known = frozenset(sys.modules)
    importlib.import_module("of_the_user")
    new = next(name for name in ("wave", "mailbox", "this", "cgitb") if name not in known)
    with contextlib.redirect_stdout(io.StringIO()):
        importlib.import_module(new)
    assert new in learned(known) and "of_the_user" not in learned(known)


def test_nothing_is_tried_before_its_time():
    imports = Imports()
    assert imports.due(1e9, has_died=True) is None, "nothing was heard"
    imports.hear(["json"], 10.0)
    assert imports.due(10.0 + PATIENCE, has_died=False) is None
    trial = imports.due(10.1 + PATIENCE, has_died=False)
    assert trial is not None
    select.select([trial], [], [], 30)
    imports.tried()
    assert imports.due(1e9, has_died=True) is None, "once is enough"


def test_a_trial_is_not_replaced_by_another():
    """A supervisor still waits for its pidfd; a new one would have the same number."""
    imports = Imports()
    imports.hear(["json"], 0.0)
    trial = imports.due(0.0, has_died=True)
    for names in (["json"], ["json", "wave"]):
        imports.hear(names, 1.0)
        assert imports.due(1.0, has_died=True) is None
    select.select([trial], [], [], 30)
    imports.tried()
    later = imports.due(2.0, has_died=True)
    assert later is not None, "what was heard meanwhile is tried then"
    imports.hear(["json", "wave"], 2.0)
    select.select([later], [], [], 30)
    imports.tried()
    assert imports.due(3.0, has_died=True) is None, "the same names are tried once"


def test_what_starts_a_thread_is_left_to_the_workers(tmp_path):
    (tmp_path / "harmless.py").write_text("x = 1")
    (tmp_path / "threaded.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
    )
    source = str(Path(samestep.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": f"{source}{os.pathsep}{tmp_path}", "OMP_NUM_THREADS": "1"}

    def taken(*names):
        command = [sys.executable, "-c", TAKES, *names]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert ended.returncode == 0, ended.stderr
        return eval(ended.stdout)

    assert taken("harmless") == ["harmless"]
    assert taken("harmless", "threaded") == []
