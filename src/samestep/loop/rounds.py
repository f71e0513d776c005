"""Rounds over clients: steps whose shards are clients, each with all batches of its local training.

    for step in run.steps(clients, batch_size=16, epochs=2, steps=20):     20 rounds
        for x, y in step:            every batch of every client played here, 2 epochs over each client's data
            step.backward(loss)      and before the next batch the client makes its step
        step.update()                what the clients did is added up, and moves the weights of all

A client's batches are a function of (seed, round, client), read for it alone. What was due is counted per round, over
samples numbered through all clients.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from samestep.agree.federated import LiveFederated
from samestep.agree.meeting import Part
from samestep.core.calls import line_of_user
from samestep.core.randomness import key, seed_sample, seed_shard
from samestep.data.fingerprint import chosen, fingerprint
from samestep.data.mixing import GOLDEN, mix
from samestep.data.proof import Proof, SampleCount
from samestep.data.shard import Request, Shard, shards_of
from samestep.data.source import Columns, as_source
from samestep.data.split import Slice
from samestep.errors import DataError, SettingsError, UsageError
from samestep.federated.clients import Clients
from samestep.federated.cohort import Cohort
from samestep.loop.evaluation import on_device
from samestep.loop.feed import Feed
from samestep.loop.session import Session
from samestep.loop.step import Driver, Step
from samestep.storage.digest import state_digest
from samestep.units import count_in_words

_ORDER = 49
"""First part of the key of a client's order, so that draws for different ends are unrelated."""

_MOST_EPOCHS = 1 << 20
_NUM_SLOW = 4
"""Clients at most whose content is looked at where reading runs user code."""


@dataclass(frozen=True)
class Local:
    """How a client trains in a round.

    Attributes:
        batch_size: samples of one of its steps; its last batch may be shorter.
        epochs: how often it goes over its data.
        shuffle: whether each time in another order.
        collate: makes a batch of a list of samples; torch's default if None.
        loaders, drop_last: what clients do not have.
    """

    batch_size: Any
    epochs: int
    shuffle: bool
    collate: Callable[[list], Any] | None
    loaders: int
    drop_last: bool

    def __post_init__(self) -> None:
        if callable(self.batch_size) or self.loaders or self.drop_last:
            raise SettingsError(
                "You set batch_size to a function, loaders or drop_last for clients. A client reads its own data when "
                "it trains, all of it, in batches of one size; leave these out."
            )
        for name, value in (("batch_size", self.batch_size), ("epochs", self.epochs)):
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MOST_EPOCHS:
                raise SettingsError(
                    f"You set {name}={value!r} for clients; it must be a whole number, 1 or more: batch_size counts "
                    f"the samples of one local step, epochs how often a client goes over its data in a round."
                )


@dataclass(frozen=True, kw_only=True)
class ClientProof(Proof):
    """What was due beside what was read, in rounds over clients.

    Attributes:
        num_clients: different ones that delivered.
        num_rounds: how many rounds.
    """

    num_clients: int
    num_rounds: int

    def in_words(self) -> str:
        clients = f"{count_in_words(self.num_clients)} client{'s' if self.num_clients != 1 else ''}"
        rounds = f"{count_in_words(self.num_rounds)} round{'s' if self.num_rounds != 1 else ''}"
        if self.holds:
            return f"{clients} in {rounds}; every sample of a client once per local epoch"
        due, read = count_in_words(self.due.num_samples), count_in_words(self.read.num_samples)
        return f"{clients} in {rounds}: {due} samples were due, {read} read (hash {self.read.digest})"


class ClientFeed(Feed):
    """Feeds the clients of each round; counts what they were due to read, and what they read."""

    def __init__(self, data: Clients, num_samples: int, seed: tuple[int, int]):
        super().__init__(data, num_samples, seed)
        lengths = [data.len_of(client) for client in range(len(data))]
        self.offsets = np.concatenate(([0], np.cumsum(lengths)))
        self.lengths = lengths
        self.num_rounds = 0
        self._due = SampleCount()
        self._seen: set[int] = set()
        self._open: dict[int, tuple[Cohort, int]] = {}

    def open(self, cohort: Cohort, epochs: int) -> None:
        """Note that a round is to be made, in which clients go so often over their data."""
        self._open = {cohort.number: (cohort, epochs)}

    def cohort_of(self, number: int) -> Cohort:
        """Return the clients of the round that is open."""
        return self._open[number][0]

    def commit(self, batch: Slice, read: SampleCount, bad: Sequence[tuple[int, str]] = ()) -> None:
        cohort, epochs = self._open.pop(batch.number)
        ids = [np.arange(*self.offsets[[client, client + 1]]) for client in cohort.delivering]
        for epoch in range(epochs) if ids else ():
            self._due += SampleCount.of(place_of(cohort.number, epoch), np.concatenate(ids))
        self.num_rounds += 1
        self._seen.update(cohort.delivering)
        self.read += read

    def content_of_clients(self, collate: Callable[[list], Any] | None) -> list[str]:
        """Return fingerprints of some clients' content, as they were when first asked for."""
        if self._content is None:
            self._content = []
            for place, client in enumerate(np.concatenate(chosen(len(self.data))).tolist()):
                source = as_source(self.data.data_of(client), collate)
                if place >= _NUM_SLOW and type(source) is not Columns:
                    break
                found = fingerprint(source, state_digest, seed_sample)
                if not found:
                    # What follows would be compared with another client's.
                    break
                self._content.append(found[0])
        return self._content

    def proof(self) -> ClientProof:
        return ClientProof(
            coverage=self.coverage,
            due=self._due,
            read=self.read,
            num_clients=len(self._seen),
            num_rounds=self.num_rounds,
        )


def place_of(number: int, epoch: int) -> int:
    """Return what stands for a local epoch of a round where samples are counted."""
    return number * _MOST_EPOCHS + epoch


class ClientWalk:
    """One call of `run.steps` over clients: makes the rounds, and reads what clients train on."""

    def __init__(self, feed: ClientFeed, local: Local, live: LiveFederated, seed: int):
        self.feed = feed
        self.local = local
        self.live = live
        self._seed = seed

    def slices(self, first: int, num_rounds: int) -> Iterator[Slice]:
        """Yield the rounds; the clients of each are drawn when it comes."""
        for number in range(first, first + num_rounds):
            cohort = self.live.recipe.cohort(number, self._seed, self.feed.lengths, self.local.epochs)
            self.feed.open(cohort, self.local.epochs)
            self.live.begin_round(cohort)
            yield Slice(number, self.feed.num_rounds, 0, cohort.num_samples * self.local.epochs, True)

    def stream(
        self, replicas: range, slices: Iterator[Slice], ahead: deque[Slice], claims: bool
    ) -> Generator[tuple[Slice, Sequence[Shard | None]], None, None]:
        """Yield the rounds; clients are read when they are played."""
        while True:
            batch = next(slices, None)
            if batch is None:
                return
            self.live.check_budget()
            ahead.append(batch)
            yield batch, ()

    def read(self, worker: Any, batch: Slice) -> Sequence[Shard | None]:
        """Return what the walk reads ahead: nothing."""
        return ()

    def step(self, driver: Driver, batch: Slice, shards: Sequence[Shard | None] | None) -> Step:
        """Return the step of a round."""
        return Round(driver, batch, shards, self)

    def batches(self, number: int, client: int, device: str) -> Iterator[tuple[int, np.ndarray, Any]]:
        """Yield what a client trains on in a round: local epoch, samples numbered through all clients, batch.

        Raises:
            DataError: a sample or the collate function failed.
        """
        source = as_source(self.feed.data.data_of(client), self.local.collate)
        num_samples, offset = len(source), int(self.feed.offsets[client])

        def seed_own(seed: int, epoch: int, sample: int) -> None:
            seed_sample(seed, epoch, offset + sample)

        for epoch in range(self.local.epochs):
            order = np.arange(num_samples)
            if self.local.shuffle:
                # Clients are small: sorting is cheaper than a permutation that knows any part of itself.
                drawn = mix(order.astype(np.uint64) * np.uint64(GOLDEN) + np.uint64(self._key(number, client, epoch)))
                order = np.argsort(drawn, kind="stable")
            for start in range(0, num_samples, self.local.batch_size):
                ids = order[start : start + self.local.batch_size]
                try:
                    (shard,) = shards_of(Request(place_of(number, epoch), (ids,)), source, self._seed, seed_own)
                except DataError as error:
                    raise DataError(f"Client {client}: {error}") from error.__cause__
                assert shard is not None
                yield epoch, offset + shard.ids, on_device(shard.batch, device)

    def _key(self, number: int, client: int, epoch: int) -> int:
        return key(_ORDER, self._seed, number, client, epoch)


def begin_rounds(session: Session, clients: Any, local: Local, steps: int | None) -> tuple[ClientWalk, Iterator[Slice]]:
    """Return the walk through rounds over clients, and the rounds. Collective.

    Raises:
        UsageError, SettingsError: the data and the way to agree do not fit together, or it is not said how long to go.
    """
    live = session.agreed
    if not isinstance(live, LiveFederated):
        raise UsageError(
            f"You gave run.steps Clients under agree={live.recipe!r}. Clients train in rounds: call "
            f"run.replicate(..., agree=samestep.Federated(clients, sample=0.3))."
        )
    if not isinstance(clients, Clients):
        raise UsageError(
            f"You gave run.steps a {type(clients).__name__} under agree=Federated(...), where each client has data of "
            f"its own. Give samestep.Clients.of([...]), with one data set for each client."
        )
    if len(clients) != live.recipe.num_clients:
        raise UsageError(
            f"You gave run.steps {len(clients)} clients, but agree=Federated(clients={live.recipe.num_clients}) at "
            f"run.replicate. Give the same Clients in both places."
        )
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        raise SettingsError(
            f"You set steps={steps!r} for clients; steps= is the number of rounds, a whole number, and epochs= how "
            f"often a client goes over its data in each."
        )
    assert session.model is not None
    if session.model.states:
        raise UsageError(
            "You called run.per_replica under agree=Federated(...), where replicas are places in a round, taken "
            "by other clients each time. Clients keep nothing from round to round."
        )
    feed = session.feed(clients, sum(map(clients.len_of, range(len(clients)))), ClientFeed)
    assert isinstance(feed, ClientFeed)
    session.check_data(
        {
            "clients": len(clients),
            "samples": feed.num_samples,
            "batch_size": local.batch_size,
            "epochs": local.epochs,
            "shuffle": local.shuffle,
            "content": feed.content_of_clients(local.collate),
        }
    )
    session.plan(feed.num_samples, local.batch_size, None, steps)
    walk = ClientWalk(feed, local, live, session.recipe.seed)
    return walk, walk.slices(session.record.num_steps, steps)


class Round(Step):
    """A step over clients: its shards are clients, and each yields all batches of its local training.

    Attributes:
        client: the one whose batch is at hand; None outside of the loop over batches.
        clients: those drawn for the round, ascending.
        lost: those of them that do not deliver, ascending.
    """

    def __init__(self, driver: Driver, slice_: Slice, shards: Sequence[Shard | None] | None, walk: ClientWalk):
        super().__init__(driver, slice_, shards)
        self._walk = walk
        self._cohort = walk.feed.cohort_of(slice_.number)
        self.client: int | None = None
        self.clients = list(self._cohort.drawn)
        self.lost = sorted(self._cohort.lost)

    def describe(self, replica: int) -> str:
        return f"round {self.number}, client {self._cohort.client_of[replica]}"

    def _play_mine(self, drawn: Any) -> Generator[Any, None, None]:
        if self.pass_:
            raise UsageError(
                f"Round {self.number} was iterated again at {line_of_user()}; its clients have trained. A round has "
                f"one update: take more rounds, or more local epochs."
            )
        session, live = self._driver.session, self._walk.live
        self._part, self._broken = Part(), None
        read = SampleCount()
        live.begin_pass()
        for index, leaf in enumerate(live.leaves):
            live.begin_shard(index, leaf)
            if leaf in self._cohort.client_of:
                session.clock.begin_shard(self.number, leaf)
                read += yield from self._play_client(leaf)
                session.clock.begin_shard(self.number, -1)
            live.end_shard(leaf)
        self._part.read = read.num_samples, read.hash

    def _play_client(self, leaf: int) -> Generator[Any, None, SampleCount]:
        """Yield the batches of a client; return what it has read."""
        session, live, part = self._driver.session, self._walk.live, self._part
        model, clock, client = session.model, session.clock, self._cohort.client_of[leaf]
        assert model is not None
        model.buffers.begin_shard(leaf)
        ids: list[list[np.ndarray]] = [[] for _ in range(self._walk.local.epochs)]
        tally = _Tally(part, leaf)
        self._replica, self.client = leaf, client
        before = clock.to("data")
        try:
            batches = self._walk.batches(self.number, client, session.worker.device)
            for number, (epoch, samples, batch) in enumerate(batches):
                seed_shard(self._seed, self.number, number, client)
                self._count = len(samples)
                clock.to("compute")
                yield batch
                if not tally.take(self._count):
                    raise UsageError(
                        f"step.backward was not called for a batch of {self.describe(leaf)}. Call it once or more for "
                        f"every batch (with count=0 if the batch should not count)."
                    )
                live.end_batch()
                clock.to("data")
                ids[epoch].append(samples)
        except GeneratorExit:
            # The loop was left inside a shard: by an error, most likely.
            self.left_in = leaf
            raise
        finally:
            live.leave_shard()
            self._replica = self.client = None
            clock.to(before)
        part.samples[leaf] = tally.close()
        if model.buffers.end_shard(leaf):
            part.changed.append(leaf)
        read = SampleCount()
        for epoch, parts in enumerate(ids):
            read += SampleCount.of(place_of(self.number, epoch), np.concatenate(parts))
        return read


class _Tally:
    """What one client told of its batches, as one entry."""

    def __init__(self, part: Part, leaf: int):
        self._part, self._leaf = part, leaf
        self._num_losses = self._first = len(part.losses)
        self._num_means = {name: len(told) for name, told in part.means.items()}
        self._means: dict[str, list[tuple[float, int]]] = {}
        self._num_samples = 0

    def take(self, count: int) -> bool:
        """Take the batch at hand, of `count` samples; return whether it had a loss."""
        part = self._part
        had_loss = len(part.losses) > self._num_losses
        self._num_losses = len(part.losses)
        self._num_samples += count
        for name, told in part.means.items():
            first = self._num_means.get(name, 0)
            self._means.setdefault(name, []).extend((value, count) for _, value in told[first:])
            del told[first:]
        return had_loss

    def close(self) -> int:
        """Replace what was told by means over the client's samples; return how many samples it went over."""
        losses = self._part.losses
        mine = [(loss, count) for _, loss, count in losses[self._first :]]
        losses[self._first :] = [(self._leaf, _mean(mine), math.fsum(count for _, count in mine))]
        for name, told in self._means.items():
            if told:
                self._part.means[name].append((self._leaf, _mean(told)))
        return self._num_samples


def _mean(told: Sequence[tuple[float, float]]) -> float:
    """Return a weighted mean; a value that is not finite, if there is one, as it is."""
    for value, _ in told:
        if not math.isfinite(value):
            return value
    total = math.fsum(weight for _, weight in told)
    return math.fsum(value * weight for value, weight in told) / total if total else 0.0
