"""For all rooms: one torch thread, the laws' own modules, and test programs played by real worker processes."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import samestep.errors

_SOURCE = str(Path(samestep.errors.__file__).parents[1])
_SCRIPTS = [str(Path(__file__).with_name(name)) for name in ("laws", "agree")]
sys.path.extend(_SCRIPTS)
_SINGLE = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="also run the tests that `make chaos` runs")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--long"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="one more case of what is tested: `make chaos` runs it"))


class Fleet:
    """Asks `group_fleet.py` to play programs."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("group_fleet.py")
        path = os.pathsep.join([_SOURCE, *_SCRIPTS, os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **_SINGLE, "PYTHONPATH": path},
        )

    def outcomes(self, program: Callable, kind: str, size: int, limit_seconds: float = 60, **arguments) -> list[dict]:
        """Play `program(group, **arguments)` in `size` processes; return what became of each."""
        request = {
            "file": inspect.getsourcefile(program),
            "program": program.__name__,
            "kind": kind,
            "size": size,
            "arguments": arguments,
            "limit_seconds": limit_seconds,
        }
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "The fleet's parent process has ended."
        return json.loads(line)

    def play(self, program: Callable, kind: str, size: int, **arguments) -> list:
        """Play a program that no worker may fail and that leaves nothing; return what the workers returned."""
        outcomes = self.outcomes(program, kind, size, **arguments)
        for rank, outcome in enumerate(outcomes):
            assert "returned" in outcome, f"worker {rank}: {outcome.get('traceback', outcome)}"
            assert outcome["left"] == [], f"worker {rank} left something behind"
        return [outcome["returned"] for outcome in outcomes]

    def close(self) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@pytest.fixture(scope="session")
def fleet() -> Iterator[Fleet]:
    fleet = Fleet()
    yield fleet
    fleet.close()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Intra-op threads are part of a recipe; the tests' recipes say 1."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
