"""Stale steps on started workers: their schedule is replayed to the bit, and a death loses nothing."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("stale_script.py")


def run(environment, folder, name, *arguments):
    facts = folder / name
    ended = subprocess.run(
        [sys.executable, str(SCRIPT), str(facts), *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(facts.read_text()), ended.stderr


def test_a_death_under_way_and_the_schedule_replayed(clean_environment, tmp_path):
    schedule = tmp_path / "schedule"
    played, summary = run(clean_environment, tmp_path, "played", 2, "record", schedule, 25)
    assert (tmp_path / "played.died").exists(), "nobody died: the test would show nothing"
    assert "96 of 96 samples exactly once" in summary and "staleness" in summary
    lags = [json.loads(line) for line in schedule.read_text().splitlines()[1:]]
    assert len(lags) == 40 and max(map(max, lags)) <= 3
    replayed, _ = run(clean_environment, tmp_path, "replayed", 1, "replay", schedule)
    assert replayed == played
