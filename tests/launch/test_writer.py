"""Whatever becomes of the writer, there is one answer to each order, it is named, and the next one is tried."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import samestep

SOURCE = str(Path(samestep.__file__).parents[1])
FAILED = "The checkpoint of step 1 to kept could not be written: {}. Earlier checkpoints are untouched."


def told(what):
    script = Path(__file__).with_name("writing.py")
    ended = subprocess.run(
        [sys.executable, script, what], capture_output=True, text=True, timeout=60, env={"PYTHONPATH": SOURCE}
    )
    assert ended.returncode == 0, ended.stderr
    end = json.loads(ended.stdout)
    assert end["same_descriptors"] and end["children"] == ""
    assert len(end["answers"]) == 2 and None not in end["answers"]
    return end["answers"][0]


def test_it_writes():
    assert told("writes") == {"step": 1, "trouble": None}


def test_a_long_answer_arrives():
    assert told("long")["message"] == "x" * 60_000


def test_a_signal_for_the_supervisor_does_not_end_it():
    assert told("is told to end") == {"step": 1, "trouble": None}


def test_it_is_not_hung_while_it_writes():
    """It takes twice as long as a silent one may."""
    assert told("is slow") == {"step": 1, "trouble": None}


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("raises", "ZeroDivisionError: division by zero"),
        ("dies", "the process that wrote it was killed (SIGKILL)"),
        ("leaves", "the process that wrote it ended with exit code 3"),
        ("hangs", "the process that wrote it wrote nothing for 0.5 s, and was killed"),
    ],
)
def test_what_goes_wrong_is_named(what, reason):
    assert told(what) == {"message": FAILED.format(reason), "reason": reason}


def test_it_is_not_forked_from_a_process_with_threads():
    assert "must have one thread, but has 2" in told("thread")["reason"]
