"""Strikes at the lines of our own protocol change no bit, and find the bugs that are planted in it.

The long forms are in docs/faults.md.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
MORE = ("stop", "oserror", "memory")
LATE = 3
"""Cases of which a strike may not come: some lines are reached only if a worker happens to wait for another."""


@pytest.fixture
def lines_of(tmp_path, clean_environment):
    """Run a campaign in a process of its own, because it forks; return its JSON lines."""

    def run(script, *arguments):
        ended = subprocess.run(
            [sys.executable, str(HERE / script), *arguments],
            env={**clean_environment, "TMPDIR": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=880,
            check=False,
        )
        assert ended.returncode in (0, 1), ended.stderr
        assert list(tmp_path.iterdir()) == [], "files are left"
        *cases, total = map(json.loads, ended.stdout.splitlines())
        assert ended.returncode == min(total["wrong"], 1)
        return cases, total

    return run


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["kill", *(pytest.param(kind, marks=pytest.mark.long) for kind in MORE)])
def test_a_strike_in_each_function_of_the_protocol_changes_no_bit(lines_of, kind):
    cases, total = lines_of("points.py", "--kinds", kind)
    assert not [case for case in cases if case["wrong"]]
    assert total["never_reached"] == [], "the list of functions holds some that no run comes to"
    assert total["cases"] > 80 and total["functions_and_workers"] > 150
    if kind in ("kill", "stop"):
        # After an error before the first recorded call there is no second run for the other worker.
        assert total["missed"] <= LATE, [case["strikes"] for case in cases if not case["struck"]]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_worker_that_is_late_at_a_line_changes_no_bit(lines_of):
    cases, _ = lines_of("points.py", "--kinds", "pause")
    assert not [case for case in cases if case["wrong"]]


@pytest.mark.timeout(900)
def test_bugs_planted_in_the_protocol_are_found(lines_of):
    bugs, total = lines_of("planted.py")
    assert total["bugs"] >= 20
    assert not [bug["bug"] for bug in bugs if not bug["found"]], "these live"
    assert not [bug for bug in bugs if bug["without"]], "these runs are wrong without any bug"
