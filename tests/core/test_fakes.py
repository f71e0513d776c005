"""The fakes do what they say; that they are groups is held by test_group_contract.py."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
import torch

from samestep.core.fakes import Counting, Delaying, Failing, run_threads, thread_groups
from samestep.core.group import Group, Solo
from samestep.core.randomness import seed_everything
from samestep.core.worker import Worker
from samestep.errors import MismatchError, PeerError


def test_threads_run_one_at_a_time_in_rank_order():
    running, trace = [], []

    def program(group):
        for turn in range(3):
            running.append(group.worker.rank)
            time.sleep(0.001)
            trace.append((turn, tuple(running)))
            running.remove(group.worker.rank)
            group.exchange(b"")

    run_threads(program, 3)
    assert trace == [(turn, (rank,)) for turn in range(3) for rank in range(3)]


def test_each_thread_finds_the_generators_as_it_left_them():
    def draw():
        return [torch.rand(1).item(), np.random.rand(), random.random()]

    def program(group):
        first = draw()
        group.exchange(b"")
        seed_everything(100 + group.worker.rank)
        second = draw()
        group.exchange(b"")
        return first, second, draw()

    seed_everything(5)
    start = draw()
    expected = []
    for rank in range(3):
        seed_everything(100 + rank)
        expected.append((start, draw(), draw()))
    seed_everything(5)
    assert run_threads(program, 3) == expected
    assert draw() == start


def test_a_thread_that_returns_early_is_missed():
    def program(group):
        group.exchange(b"")
        if group.worker.rank != 1:
            group.exchange(b"")

    with pytest.raises(PeerError, match="worker 1 has ended"):
        run_threads(program, 3)


def test_the_first_error_that_is_no_peer_error_is_raised():
    def program(group):
        group.exchange(b"")
        if group.worker.rank == 0:
            raise PeerError("a consequence")
        raise KeyError(f"cause in {group.worker.rank}")

    with pytest.raises(KeyError, match="cause in 1"):
        run_threads(program, 3)


def test_threads_that_allocate_different_sizes_are_told():
    with pytest.raises(MismatchError, match="asks for 20 bytes where another asked for 10"):
        run_threads(lambda group: group.allocate(10 * (1 + group.worker.rank)), 2)


def test_thread_groups_know_their_worker():
    assert [group.worker for group in thread_groups(2)] == [Worker(rank=r, size=2, local_rank=r) for r in range(2)]


def counts_what_it_moves(group: Group) -> dict:
    counting = Counting(group)
    rank = counting.worker.rank
    runs = [range(100), range(100, 164), range(164, 171)]
    memory = counting.allocate(171)
    area = counting.gradient_area(171, [2, 2, 1], [[1, 0], [1], [0]], runs)
    for _ in range(2):
        counting.exchange(b"x" * (rank + 1))
        area.collect()
    counting.share(memory, runs)
    counting.post(b"x" * rank, [0, 1, 2])()
    counting.exchange(b"")
    return {kind: [counting.num_calls[kind], counting.num_bytes[kind]] for kind in counting.num_calls}


@pytest.mark.parametrize("kind", ["threads", "arena", "gloo"])
def test_counting_counts_calls_and_bytes(fleet, kind):
    share = [0, 0, 0] if kind != "gloo" else [71, 107, 164]
    counts = run_threads(counts_what_it_moves, 3) if kind == "threads" else fleet.play(counts_what_it_moves, kind, 3)
    assert counts == [
        {"exchange": [3, 10], "post": [1, 3], "collect": [2, 2 * 2 * 100], "share": [1, share[0]]},
        {"exchange": [3, 8], "post": [1, 2], "collect": [2, 2 * 3 * 64], "share": [1, share[1]]},
        {"exchange": [3, 6], "post": [1, 1], "collect": [2, 2 * 3 * 7], "share": [1, share[2]]},
    ]


@pytest.mark.parametrize("kind", ["exchange", "post", "collect", "share"])
def test_failing_raises_at_its_call_and_only_there(kind):
    group = Failing(Solo(), kind, 2, OSError("planted"))
    area = group.gradient_area(8, [1], [[0]], [range(8)])
    memory = group.allocate(8)
    calls = {
        "exchange": lambda: group.exchange(b"m"),
        "post": lambda: group.post(b"m", [1])(),
        "collect": area.collect,
        "share": lambda: group.share(memory, [range(8)]),
    }
    for turn in (1, 2, 3):
        for name, call in calls.items():
            if (turn, name) == (2, kind):
                with pytest.raises(OSError, match="planted"):
                    call()
            else:
                call()


def test_failing_in_one_thread_ends_the_others():
    ended = []

    def program(group):
        if group.worker.rank == 1:
            group = Failing(group, "exchange", 3, OSError("planted"))
        try:
            for _ in range(5):
                group.exchange(b"")
        finally:
            ended.append(group.worker.rank)

    with pytest.raises(OSError, match="planted"):
        run_threads(program, 3)
    assert sorted(ended) == [0, 1, 2]


def test_failing_refuses_an_unknown_kind():
    with pytest.raises(ValueError, match="'barrier'; it must be one of exchange"):
        Failing(Solo(), "barrier", 1)


def test_delaying_sleeps_before_each_call(monkeypatch):
    naps = []
    monkeypatch.setattr("samestep.core.fakes.time.sleep", naps.append)
    group = Delaying(Solo(), 0.25)
    area = group.gradient_area(8, [1], [[0]], [range(8)])
    assert group.exchange(b"m") == [b"m"]
    assert group.post(b"m", [1])() == [b"m"]
    area.collect()
    group.share(group.allocate(8), [range(8)])
    assert naps == [0.25] * 4
