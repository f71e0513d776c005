"""The law: each sample is in exactly one step per epoch, whatever the sizes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from playing import assert_same_bits, play
from zoo import classes_loss

from samestep.core.division import Division
from samestep.data.proof import SampleCount
from samestep.data.source import as_source
from samestep.data.split import schedule
from samestep.loop.feed import Feed, Reading, count_read

SIZES = st.integers(1, 70)


def assert_each_exactly_once(
    num_samples: int, batch_size: int, num_replicas: int, num_workers: int, shuffle: bool = True, epochs: int = 2
) -> None:
    """The law, over the feeds of all workers; every number is seen where a worker would see it."""
    data = np.arange(num_samples) * 10
    seen: list[Counter] = [Counter() for _ in range(epochs)]
    shards_of_step: dict[int, list] = {}
    total, orders = SampleCount(), []
    for rank in range(num_workers):
        feed = Feed(data, num_samples, (3, 0))
        feed.use_shuffle(shuffle)
        mine = Division.even(num_workers, num_replicas).of(rank)
        reading = Reading(seed=3, shuffle=shuffle, num_replicas=num_replicas, replicas=mine, loaders=0)
        slices = schedule(num_samples, batch_size, epochs=epochs)
        for batch, shards in feed.batches(as_source(data), slices, reading):
            for replica, shard in zip(mine, shards, strict=True):
                if shard is None:
                    continue
                assert shard.ids.tolist() == (shard.batch // 10).tolist(), "what was read is not what was asked for"
                seen[batch.epoch].update(shard.ids.tolist())
                shards_of_step.setdefault(batch.number, []).append((replica, len(shard.ids)))
            feed.commit(batch, SampleCount(*count_read(batch.epoch, shards)))
        total += feed.read
        orders.append([feed.order(epoch).ids(0, num_samples).tolist() for epoch in range(epochs)])
    for epoch in range(epochs):
        assert seen[epoch] == Counter(range(num_samples)), f"epoch {epoch}"
    feed.read = total
    assert feed.proof().holds
    assert all(order == orders[0] for order in orders), "workers differ in the order of an epoch"
    for shards in shards_of_step.values():
        sizes = [size for _, size in sorted(shards)]
        assert max(sizes) - min(sizes) <= 1, "shards are not as even as can be"


@settings(max_examples=120, deadline=None)
@given(num_samples=SIZES, batch_size=SIZES, replicas=st.integers(1, 12), workers=st.data(), shuffle=st.booleans())
def test_any_sizes(num_samples, batch_size, replicas, workers, shuffle):
    num_workers = workers.draw(st.integers(1, replicas))
    assert_each_exactly_once(num_samples, batch_size, replicas, num_workers, shuffle)


@settings(max_examples=8, deadline=None)
@given(num_samples=st.integers(1, 30), batch_size=st.integers(1, 33), replicas=st.integers(1, 6), workers=st.data())
def test_whole_runs(num_samples, batch_size, replicas, workers):
    num_workers = workers.draw(st.integers(1, replicas))
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(num_samples, 4, generator=generator), torch.arange(num_samples) % 3

    def main(run):
        model = torch.nn.Linear(4, 3)
        run.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1))
        told = []
        for _ in range(2):
            for step in run.steps(data, batch_size=batch_size, epochs=1):
                for batch in step:
                    step.backward(classes_loss(model, batch))
                step.update()
                told.append([step.number, step.epoch, step.ends_epoch, step.loss])
        return told

    told = assert_same_bits(main, [(replicas, 1), (replicas, num_workers)]).result
    per_epoch = -(-num_samples // batch_size)
    assert [entry[:3] for entry in told] == [
        [number, number // per_epoch, number % per_epoch == per_epoch - 1] for number in range(2 * per_epoch)
    ]


def test_epochs_have_orders_of_their_own():
    feed = Feed(None, 50, (3, 0))
    orders = [tuple(feed.order(epoch).ids(0, 50)) for epoch in range(6)]
    assert len(set(orders)) == 6
    assert tuple(Feed(None, 50, (4, 0)).order(0).ids(0, 50)) != orders[0]
    assert tuple(Feed(None, 50, (3, 1)).order(0).ids(0, 50)) != orders[0]
    assert tuple(Feed(None, 50, (3, 0)).order(5).ids(0, 50)) == orders[5]


def test_last_batch_may_be_dropped():
    def main(run):
        model = torch.nn.Linear(4, 3)
        run.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1))
        data = torch.randn(23, 4), torch.arange(23) % 3
        for step in run.steps(data, batch_size=5, epochs=2, drop_last=True):
            for batch in step:
                step.backward(classes_loss(model, batch))
            step.update()

    played = play(main, 3, 2)
    assert (played.steps, played.exactly_once) == (8, True)
