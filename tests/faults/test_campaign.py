"""The short form of the campaigns; the long ones are in docs/faults.md."""

import json
import subprocess
import sys
from pathlib import Path

import samestep

HERE = Path(__file__).parent
SOURCE = Path(samestep.__file__).parents[1]


def lines_of(script, *arguments, environment):
    """Run a campaign and return its JSON lines."""
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert ended.returncode in (0, 1), ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines()], ended


def test_random_deaths_change_no_bit(tmp_path, clean_environment):
    lines, ended = lines_of("campaign.py", "--cases", 8, environment={**clean_environment, "TMPDIR": str(tmp_path)})
    assert lines, ended.stderr
    *cases, total = lines
    assert not [case for case in cases if case["wrong"]]
    assert total["wrong"] == 0 and total["cases"] == 8
    assert total["deaths"] >= 8, "the faults did not strike"
    assert ended.returncode == 0, ended.stderr
