"""The newest state in memory: whole or not there, and readable by a process that did not write it."""

import os
import signal

import pytest
import torch

from samestep.core.snapshot import Snapshots


@pytest.fixture
def snapshots():
    made = Snapshots()
    yield made
    made.close()


def keep(snapshots, step):
    tied = torch.full((3, 2), float(step))
    weights = {"a": tied, "b": tied, "empty": torch.empty(0), "odd": torch.arange(5, dtype=torch.int16)}
    state = {"scalar": torch.tensor(step), "half": torch.ones(7, dtype=torch.bfloat16) * step, "wide": tied.t()}
    return snapshots.write(step, weights, state, {"ledger": b"x" * step, "list": [1, None]})


def test_there_is_none_at_first(snapshots):
    assert snapshots.newest() is None and snapshots.num_calls == 0


def test_the_newest_comes_back(snapshots):
    for step in (1, 2, 300, 4):
        assert keep(snapshots, step) > 0
        found = snapshots.newest()
        assert found.step == step and found.facts == {"ledger": b"x" * step, "list": [1, None]}
        assert torch.equal(found.weights["a"], torch.full((3, 2), float(step)))
        assert found.weights["a"].data_ptr() == found.weights["b"].data_ptr()
        assert found.weights["empty"].shape == (0,) and found.weights["odd"].tolist() == [0, 1, 2, 3, 4]
        assert found.state["scalar"].item() == step and found.state["scalar"].dim() == 0
        assert found.state["half"].dtype == torch.bfloat16 and found.state["half"].tolist() == [float(step)] * 7
        assert torch.equal(found.state["wide"], torch.full((2, 3), float(step)))


def test_a_writer_that_dies_leaves_the_one_before(snapshots, monkeypatch):
    keep(snapshots, 1)
    pid = os.fork()
    if pid == 0:
        monkeypatch.setattr(torch.Tensor, "copy_", lambda *a: os._exit(9))
        keep(snapshots, 2)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert snapshots.newest().step == 1


def test_another_process_writes_and_counts(snapshots):
    pid = os.fork()
    if pid == 0:
        keep(snapshots, 5)
        snapshots.num_calls = 7
        snapshots.num_calls = 3
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert snapshots.newest().step == 5
    assert snapshots.num_calls == 7, "it never goes back"


def test_without_room_for_two_one_is_used(snapshots, monkeypatch):
    monkeypatch.setattr("samestep.core.snapshot.available_bytes", lambda: 10)
    for step in (1, 2, 3):
        keep(snapshots, step)
        assert snapshots.newest().step == step
    assert os.fstat(snapshots._memories[1]).st_size == 0


def flip(snapshots, number, at):
    os.pwrite(snapshots._memories[number], bytes([os.pread(snapshots._memories[number], 1, at)[0] ^ 4]), at)


@pytest.mark.parametrize("at", [0, 3, 9, 40, 300, 700, -1])
def test_a_flipped_bit_is_found_and_the_older_one_taken(snapshots, at):
    keep(snapshots, 1)
    num_bytes = keep(snapshots, 2)
    number = snapshots._words.tolist().index(2)
    flip(snapshots, number, at % num_bytes)
    assert snapshots.newest().step == 1 and snapshots.damaged == [2]
    flip(snapshots, number, at % num_bytes)
    assert snapshots.newest().step == 2 and snapshots.damaged == []
    flip(snapshots, number, at % num_bytes)
    flip(snapshots, 1 - number, 77)
    assert snapshots.newest() is None and snapshots.damaged == [2, 1]


def test_what_is_withdrawn_is_written_over_first(snapshots):
    keep(snapshots, 1)
    keep(snapshots, 2)
    snapshots.withdraw(2)
    assert snapshots.newest().step == 1 and snapshots.damaged == []
    keep(snapshots, 3)
    snapshots.withdraw(3)
    assert snapshots.newest().step == 1


def test_what_is_lent_stays_and_the_others_go_on(snapshots):
    keep(snapshots, 1)
    keep(snapshots, 2)
    snapshots.lend(0)
    for step in (3, 4, 5):
        keep(snapshots, step)
        assert snapshots.newest().step == step
        lent = snapshots.lent()
        assert lent.step == 2 and torch.equal(lent.weights["a"], torch.full((3, 2), 2.0))
    snapshots.take_back()
    assert snapshots.lender is None
    keep(snapshots, 6)
    assert snapshots.newest().step == 6 and len({memory.step for memory in map(snapshots._read, (0, 1))} - {2}) == 2


def test_a_writer_that_dies_leaves_what_is_lent(snapshots, monkeypatch):
    keep(snapshots, 1)
    keep(snapshots, 2)
    snapshots.lend(0)
    keep(snapshots, 3)
    monkeypatch.setattr(torch.Tensor, "copy_", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        keep(snapshots, 4)
    assert snapshots.newest().step == 2


def test_without_room_for_two_nothing_is_kept_while_one_is_lent(snapshots, monkeypatch):
    monkeypatch.setattr("samestep.core.snapshot.available_bytes", lambda: 10)
    keep(snapshots, 1)
    snapshots.lend(0)
    assert keep(snapshots, 2) == 0 and snapshots.newest().step == 1
    snapshots.take_back()
    assert keep(snapshots, 3) > 0 and snapshots.newest().step == 3


def test_what_grows_with_every_step_is_not_mapped_anew(snapshots):
    """A new map of a large state would take as long as copying it several times."""
    keep(snapshots, 1)
    keep(snapshots, 2)
    maps = list(snapshots._maps.values())
    for step in range(3, 400):
        keep(snapshots, 40 * step)
    assert list(snapshots._maps.values()) == maps
    assert snapshots.newest().facts["ledger"] == b"x" * 40 * 399
    assert 0 < snapshots.num_bytes < 100_000, "room that is not used takes no memory"


def test_an_offer_is_read_whole_whoever_dies_while_making_one(snapshots):
    """A real writer, killed again and again while a reader looks on."""
    offers, seen = snapshots.offers, 0
    for life in range(20):
        if (writer := os.fork()) == 0:
            while True:
                for size in (400, 1, 90, 1200, 5):
                    number = offers.newest()[0] + 1
                    offers.make({"number": number, "fill": [number] * size})
        reads = 0
        try:
            while reads < 400 or offers.newest()[0] == seen:
                number, offer = offers.newest()
                assert number >= seen and (not number or (offer["number"], set(offer["fill"])) == (number, {number}))
                seen, reads = number, reads + 1
        finally:
            os.kill(writer, signal.SIGKILL)
            os.waitpid(writer, 0)
        number, offer = offers.newest()
        assert offer["number"] == number >= seen, life
        seen = number
    assert seen > 50
