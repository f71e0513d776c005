"""Buffers: each shard starts from the step's; then they are merged by samples."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from samestep.core.buffers import Buffers
from samestep.core.division import Division
from samestep.core.fakes import run_threads
from samestep.core.group import Solo
from samestep.errors import SettingsError


class Module(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("wide", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("kept", torch.full((2,), 7.0))
        self.register_buffer("nothing", None)
        self.register_buffer("empty", torch.zeros(0))


def play(group, counts: list[int], rule="mean", replace: bool = False):
    """Replica r adds r + 1 to its buffers; return the merged ones."""
    module = Module()
    buffers = Buffers([("", module)], group, len(counts), rule)
    result = []
    for _ in range(2):
        buffers.begin_pass()
        changed, samples = [], {}
        for replica in Division.even(group.worker.size, len(counts)).of(group.worker.rank):
            if not counts[replica]:
                continue
            samples[replica] = counts[replica]
            buffers.begin_shard(0)
            start = module.mean.clone()
            if replace:
                module.mean = module.mean + replica + 1
            else:
                module.mean += replica + 1
            module.wide += replica + 1
            module.count += replica + 1
            if buffers.end_shard(replica):
                changed.append(replica)
            assert torch.equal(module.mean, start + replica + 1)
        told = [eval(m.decode()) for m in group.exchange(repr([samples, changed]).encode())]
        merged = {r: c for s, _ in told for r, c in s.items()}
        buffers.merge(merged, {r for _, c in told for r in c})
        group.exchange(b"")
        result.append([module.mean.tolist(), module.wide.tolist(), int(module.count), module.kept.tolist()])
    return result


@pytest.mark.parametrize("replace", [False, True])
def test_means_are_weighted_by_samples(replace):
    counts = [3, 0, 1]
    expected = (3 * 1 + 1 * 3) / 4
    told = play(Solo(), counts, replace=replace)
    assert told[0] == [[expected] * 3, [expected] * 2, 1, [7.0, 7.0]]
    assert told[1] == [[2 * expected] * 3, [2 * expected] * 2, 2, [7.0, 7.0]]
    assert all(other == told for other in run_threads(lambda g: play(g, counts, replace=replace), 3))


def test_first_of_those_that_had_samples():
    told = play(Solo(), [0, 2, 5], rule={"mean": "first", "*": "mean"})
    assert told[0] == [[2.0] * 3, [(2 * 2 + 5 * 3) / 7] * 2, 2, [7.0, 7.0]]


def test_elements_on_which_all_agree_keep_their_bits():
    module = Module()
    value = torch.tensor([0.1, 1e-30, 3e38])
    buffers = Buffers([("", module)], Solo(), 3)
    buffers.begin_pass()
    for replica in range(3):
        buffers.begin_shard(0)
        module.mean.copy_(value)
        module.wide.fill_(replica)
        assert buffers.end_shard(replica)
    buffers.merge({0: 1, 1: 1, 2: 1}, {0, 1, 2})
    assert torch.equal(module.mean, value)
    assert module.wide.tolist() == [1.0, 1.0]


def test_buffers_have_version_counters_of_their_own():
    """Else a second BatchNorm would spoil the backward of the first."""
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    buffers = Buffers([("", model)], Solo(), 1)
    buffers.begin_pass()
    buffers.begin_shard(0)
    model(torch.randn(5, 4)).sum().backward()
    assert buffers.end_shard(0)
    assert model[0].running_mean.data_ptr() % 64 == 0


def test_unknown_rule():
    with pytest.raises(SettingsError, match="buffers='median'"):
        Buffers([("", Module())], Solo(), 2, "median")
    with pytest.raises(SettingsError, match="'last'"):
        Buffers([("", Module())], Solo(), 2, {"*": "last"})


def test_no_buffers_cost_nothing():
    buffers = Buffers([("", nn.Linear(2, 2))], Solo(), 2)
    buffers.begin_pass()
    buffers.begin_shard(0)
    assert buffers.end_shard(0) is False
    buffers.merge({0: 1}, set())
    assert buffers.num_bytes == 0
