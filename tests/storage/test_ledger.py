"""The ledger: what was recorded comes back, in order, once; anything else is an error that names both lines."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from samestep.errors import CheckpointError, MismatchError
from samestep.storage import wire
from samestep.storage.ledger import Ledger

UPDATE = (1200, 0, 0.6931471805599453, 1.2345678901234567, 12345678901234567890, 256)


def replay_of(ledger: Ledger) -> Ledger:
    """The ledger after a trip through bytes, as a checkpoint or a new worker gets it."""
    return Ledger.from_facts(wire.unpack(wire.pack(ledger.to_facts())))


def recorded(*kinds: str) -> Ledger:
    ledger = Ledger()
    for number, kind in enumerate(kinds):
        ledger.append(kind, f"train.py:{40 + number}", number)
    return ledger


def test_a_new_ledger_is_empty_and_does_not_replay():
    ledger = Ledger()
    assert not ledger.replaying and len(ledger) == 0 and list(ledger.entries()) == []
    ledger.check_finished()
    assert not replay_of(ledger).replaying


def test_values_come_back_bit_by_bit_and_in_order():
    values = [UPDATE, {"loss": -0.0, 3: [None, True, "ü"]}, math.nan, [], torch.arange(3), np.float32(0.1), b"\x00"]
    ledger = Ledger()
    for value in values:
        ledger.append("once", "a.py:1", value)
        assert not ledger.replaying
    replay = replay_of(ledger)
    found = []
    while replay.replaying:
        found.append(replay.next("once", "a.py:1"))
    assert len(found) == len(ledger) == len(replay) == len(values)
    assert found[0] == UPDATE and type(found[0]) is tuple
    assert found[1] == values[1] and math.copysign(1, found[1]["loss"]) == -1
    assert math.isnan(found[2]) and found[3] == [] and found[4].tolist() == [0, 1, 2]
    assert found[5] == float(np.float32(0.1)) and found[6] == b"\x00"
    replay.check_finished()


def test_recording_goes_on_after_a_replay_and_replays_again():
    replay = replay_of(recorded("update", "mean"))
    assert [replay.next("update", "x.py:1"), replay.next("mean", "x.py:2")] == [0, 1]
    replay.append("gather", "x.py:3", "new")
    again = replay_of(replay)
    assert [entry.kind for entry in again.entries()] == ["update", "mean", "gather"]
    assert [again.next(kind, "") for kind in ("update", "mean", "gather")] == [0, 1, "new"]
    assert not again.replaying


def test_another_kind_of_call_names_both_lines():
    ledger = recorded(*["update"] * 16, "mean", "update")
    replay = replay_of(ledger)
    for _ in range(16):
        replay.next("update", "train.py:9")
    message = r"^Call 17 was `run.mean` at train.py:56 when recorded, but now is `run.once` at train.py:44: .*changed"
    with pytest.raises(MismatchError, match=message):
        replay.next("once", "train.py:44")
    with pytest.raises(MismatchError, match=r"now is `step.update` at b.py:1"):
        replay.next("update", "b.py:1")
    assert replay.replaying and replay.next("mean", "elsewhere.py:1") == 16  # moved lines are no mismatch


def test_a_script_that_ends_early_is_named():
    replay = replay_of(recorded("update", "mean"))
    replay.next("update", "")
    with pytest.raises(
        MismatchError, match=r"ended after 1 calls, but 2 are recorded, the next one `run.mean` at train"
    ):
        replay.check_finished()


def test_order_of_use_is_an_invariant():
    with pytest.raises(AssertionError):
        Ledger().next("update", "a.py:1")
    with pytest.raises(AssertionError):
        replay_of(recorded("update")).append("update", "a.py:1", 0)


def test_what_cannot_be_packed_is_not_recorded():
    ledger = recorded("once")
    with pytest.raises(TypeError, match=r"value\['f'\] is a function"):
        ledger.append("once", "new.py:1", {"f": print.__call__ and (lambda: 0)})
    assert [entry.value for entry in replay_of(ledger).entries()] == [0]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["update", "mean", "once"]), st.sampled_from("abc"), st.integers())),
    st.data(),
)
def test_any_cut_into_parts_extends_to_the_whole(calls, data):
    """A replacement gets the ledger so far, and later what was committed meanwhile."""
    source, replay, seen = Ledger(), Ledger(), []
    for part in range(3):
        for call in calls[part::3]:
            source.append(*call)
        replay.extend(wire.unpack(wire.pack(source.to_facts(first=len(replay)))))
        num_read = data.draw(st.integers(0, len(replay) - len(seen)))
        for kind, _, _ in (calls[0::3] + calls[1::3] + calls[2::3])[len(seen) :][:num_read]:
            seen.append(replay.next(kind, ""))
    order = calls[0::3] + calls[1::3] + calls[2::3]
    assert [tuple(entry) for entry in replay.entries()] == order
    assert seen == [value for _, _, value in order][: len(seen)]
    assert replay.replaying == (len(seen) < len(order))


def test_sites_are_joined_by_what_they_say_not_by_their_number():
    ledger = recorded("once")
    ledger.extend(recorded("update", "mean", "once").to_facts())
    kinds_and_places = [(entry.kind, entry.where) for entry in ledger.entries()]
    assert kinds_and_places == [
        ("once", "train.py:40"),
        ("update", "train.py:40"),
        ("mean", "train.py:41"),
        ("once", "train.py:42"),
    ]
    assert [ledger.next(kind, "") for kind in ("update", "mean", "once")] == [0, 1, 2]


def test_a_million_updates_stay_small():
    part = Ledger()
    for _ in range(10_000):
        part.append("update", "train.py:40", UPDATE)
    ledger = Ledger()
    facts = part.to_facts()
    for _ in range(100):
        ledger.extend(facts)
    num_bytes = sum(len(column) for column in ledger.to_facts().values())
    assert len(ledger) == 1_000_000
    assert num_bytes / len(ledger) < 128
    assert ledger.next("update", "train.py:40") == UPDATE


FLAWS = {
    "no dict": lambda f: [],
    "a column missing": lambda f: {k: v for k, v in f.items() if k != "log"},
    "sites no pairs": lambda f: {**f, "sites": [["a"]]},
    "sites no text": lambda f: {**f, "sites": [[1, 2]] * 3},
    "unknown site": lambda f: {**f, "sites": f["sites"][:1]},
    "ragged": lambda f: {**f, "site_of": f["site_of"][:-4]},
    "cut inside a number": lambda f: {**f, "end_of": f["end_of"][:-1]},
    "log cut": lambda f: {**f, "log": f["log"][:-1]},
    "log too long": lambda f: {**f, "log": f["log"] + b"x"},
    "log no bytes": lambda f: {**f, "log": "x"},
    "ends fall": lambda f: {**f, "end_of": f["end_of"][8:16] + f["end_of"][:8] + f["end_of"][16:]},
    "empty call": lambda f: {**f, "end_of": bytes(8) + f["end_of"][8:]},
    "end beyond": lambda f: {**f, "end_of": f["end_of"][:-8] + b"\xff" * 8},
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_facts_that_are_none_are_refused(flaw):
    facts = recorded("update", "mean", "update").to_facts()
    Ledger.from_facts(facts)
    ledger = recorded("once")
    with pytest.raises(CheckpointError, match="ledger cannot be read"):
        ledger.extend(FLAWS[flaw](facts))
    assert [entry.kind for entry in ledger.entries()] == ["once"] and not ledger.replaying


def test_a_frame_that_is_none_is_named():
    facts = recorded("update", "mean").to_facts()
    facts["log"] = facts["log"][:-3] + b"{{{"
    replay = Ledger.from_facts(facts)
    replay.next("update", "")
    with pytest.raises(CheckpointError, match="Call 2 of the run's ledger cannot be read"):
        replay.next("mean", "")
