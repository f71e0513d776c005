"""The `fleet` fixture: test programs played by real worker processes."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import samestep.errors

_SOURCE = str(Path(samestep.errors.__file__).parents[1])
_SINGLE = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}


class Fleet:
    """Asks `group_fleet.py` to play programs."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("group_fleet.py")
        path = os.pathsep.join([_SOURCE, os.environ.get("PYTHONPATH", "")])
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
