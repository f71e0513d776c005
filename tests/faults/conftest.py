import json
import os
import sys
from pathlib import Path

import pytest

import samestep

sys.path.append(str(Path(__file__).parents[1] / "cli"))

from shell import Shell, shell_in

STEERED = Path(__file__).with_name("steered.py")


@pytest.fixture
def clean_environment():
    """The environment without what a launcher sets, and with this source first."""
    left_out = ("RANK", "WORLD_SIZE", "MASTER_ADDR")
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    return {**kept, "PYTHONPATH": str(Path(samestep.__file__).parents[1])}


class Steered:
    """A live `samestep run` of the steered script."""

    def __init__(self, shell, *arguments, mode="plain", seconds=0.05, by=("-m", "samestep", "run"), after=()):
        separator = ["--"] if by else []
        self.shell = shell
        self.process = shell.start(*by, STEERED, *arguments, *separator, mode, seconds, *after)
        self.lines = []

    def read_until(self, text):
        """Wait for a line that the script prints."""
        while True:
            line = self.process.stdout.readline()
            assert line, (self.lines, self.process.stderr.read())
            self.lines.append(line.strip())
            if line.strip() == text:
                return

    def end(self, timeout=60):
        """Wait for its end; return exit code and standard error."""
        out, err = self.process.communicate(timeout=timeout)
        self.lines += out.splitlines()
        return self.process.returncode, err

    @property
    def result(self):
        return json.loads(self.lines[-1])


@pytest.fixture
def shell(tmp_path):
    with shell_in(tmp_path) as started:
        yield started
    stayed = [path.name for path in started.temporary.iterdir() if not path.name.startswith("torchinductor_")]
    assert stayed == [], "files were left behind"


@pytest.fixture
def steered(shell):
    def start(*arguments, **settings):
        return Steered(shell, *arguments, **settings)

    return start


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """What the steered script gives on one worker if nobody disturbs it."""
    run = Steered(Shell(tmp_path_factory.mktemp("undisturbed")), "--workers", 1, seconds=0.0)
    code, err = run.end()
    assert code == 0, err
    return run.result
