"""Who is left after a death plays on, and who is new comes in, with the bits of an undisturbed run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from samestep.core.arena import Arena, Handles
from samestep.core.worker import Worker
from samestep.errors import PeerError

SCRIPT = Path(__file__).with_name("survivors.py")


def lines_of(environment, *arguments):
    ended = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, timeout=280
    )
    assert ended.stdout, ended.stderr
    return list(map(json.loads, ended.stdout.splitlines())), ended


def test_deaths_at_chosen_places_change_no_bit(clean_environment):
    cases, ended = lines_of(clean_environment)
    assert not [case for case in cases if case["wrong"]], ended.stderr
    assert len(cases) >= 14 and ended.returncode == 0, ended.stderr


def test_bugs_planted_in_going_on_are_found(clean_environment):
    bugs, ended = lines_of(clean_environment, "--planted")
    assert not [bug["bug"] for bug in bugs if not bug["wrong"]], "these live"
    assert len(bugs) >= 5 and ended.returncode == 0, ended.stderr


@pytest.fixture
def handles():
    made = Handles.create(2)
    yield made
    made.close()


def test_who_is_not_in_yet_has_not_arrived(handles):
    """Else the members would take it for there, and read what nobody has told."""
    newcomer = Arena(Worker(rank=0, size=1, local_rank=1), handles, joins=True)
    member = Arena(Worker(rank=0, size=2), handles)
    before = bytes(os.pread(handles.control, 256, 0))
    assert newcomer.exchange(b"alone") == [b"alone"]
    assert newcomer.allocate(100).tolist() == [0] * 100
    assert bytes(os.pread(handles.control, 256, 0)) == before
    newcomer.close()
    member.close()


def test_without_anybody_who_is_prepared_a_death_is_an_error(handles):
    arena = Arena(Worker(rank=0, size=2), handles)
    handles.mark_dead(1)
    with pytest.raises(PeerError, match="has died"):
        arena.exchange(b"")
    arena.close()
