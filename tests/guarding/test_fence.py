import itertools
import os
from pathlib import Path

import pytest

from samestep.guarding import stack
from samestep.guarding.fence import Fence

SLEEPING = 'Current thread 0x1 (most recent call first):\n  File "/home/u/train.py", line 40 in main\n'
COMPILING = SLEEPING.replace("/home/u/train.py", "/lib/torch/_inductor/graph.py")


class Member:
    """A worker that answers with the given stacks, one after the other."""

    rank, is_alive = 0, True

    def __init__(self, *stacks):
        self.pid = os.getpid()
        self.stack = self
        self.stacks = list(stacks)

    def ask(self, pid, stopped=False):
        return self.stacks.pop(0)


def watch(member, folder, looks=40, on_look=lambda fence, look: None, hang_after=None):
    """Look every half second at a worker that is silent in a shard; return the look that found it, and what it said."""
    fence = Fence()
    fence.begin(1)
    fence.seated(0, hang_after)
    pulse = fence.pulses.of(0)
    pulse.begin(30, 1.0, False)
    pulse.end(1.1)
    pulse.shard(30, 2)
    pulse.beat("compute")
    for look in range(looks):
        on_look(pulse, look)
        if found := fence.look(1000 + look / 2, [member], str(folder)):
            assert fence.look(2000, [member], str(folder)) is None, "its death is waited for"
            return look, found
    return None


def test_where_others_go_on_the_next_in_its_place_is_watched_anew(tmp_path):
    fence = Fence()
    fence.begin(1)
    fence.seated(0, None)

    def until_hung(begin):
        member, pulse = Member(*[SLEEPING] * 4), fence.pulses.of(0)
        for _ in range(2):
            pulse.begin(30, 1.0, False)
            pulse.end(1.1)
        pulse.beat("compute")
        looks = (fence.look(begin + look / 2, [member], str(tmp_path)) for look in range(60))
        return next((look for look, found in enumerate(looks) if found), None)

    assert until_hung(1000) == 12
    assert fence.look(2000, [Member()], str(tmp_path)) is None
    fence.renew(0)
    assert fence.pulses.read(0).beats == 0
    assert until_hung(3000) in (12, 13), "no silence of the one before is counted"


def test_a_hung_worker_is_named_with_all_that_is_known(tmp_path):
    look, (rank, text) = watch(Member(SLEEPING, SLEEPING), tmp_path)
    assert (look, rank) == (12, 0), "5 seconds, and a second look"
    path = tmp_path / "hangs" / "1-worker-0.txt"
    assert text == (
        f"Worker 0 (pid {os.getpid()}) hung in step 30, replica 2, at train.py:40. It made no progress for 6.0 s, so "
        f"it was killed. Its stack is in {path}. If that was work, give it more time: --hang-after 24."
    )
    assert SLEEPING in path.read_text()


@pytest.mark.parametrize("stacks", [(COMPILING, SLEEPING, SLEEPING), (SLEEPING, COMPILING, SLEEPING, SLEEPING)])
def test_a_worker_that_compiles_is_given_as_long_again(tmp_path, stacks):
    look, _ = watch(Member(*stacks), tmp_path)
    assert look >= 22


def test_a_worker_that_goes_on_between_two_looks_is_not_hung(tmp_path):
    def on_look(pulse, look):
        if look == 12:
            pulse.beat("compute")

    assert watch(Member(SLEEPING), tmp_path, looks=20, on_look=on_look) is None


def test_a_stack_that_cannot_be_written_is_no_reason_to_wait(tmp_path):
    in_the_way = tmp_path / "file"
    in_the_way.touch()
    _, (_, text) = watch(Member("", ""), in_the_way)
    assert "Its stack could not be written: [Errno" in text
    assert "inside C code that lets no signal through" in text
    assert Path(in_the_way).is_file()


@pytest.mark.parametrize(("used", "looks"), [(0, 2), (1, None)])
def test_a_worker_that_works_between_its_stops_is_not_replaced(tmp_path, monkeypatch, used, looks):
    ticks = itertools.count(step=used)
    monkeypatch.setattr(stack, "state_of", lambda pid: "T")
    monkeypatch.setattr(stack, "ticks_of", lambda pid: next(ticks))
    found = watch(Member(SLEEPING), tmp_path)
    assert (found and found[0]) == looks


def test_zero_never_finds_anyone(tmp_path):
    assert watch(Member(), tmp_path, hang_after=0) is None
    fence = Fence()
    fence.begin(1)
    assert fence.timeout(None) is not None, "a worker may be stopped before it is seated"
