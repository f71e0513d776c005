"""Plays a script's `main` on any number of workers, without the launcher."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from samestep.core.fakes import run_threads
from samestep.core.group import Group, Solo
from samestep.core.randomness import seed_start
from samestep.loop.recipe import Keeping, Recipe
from samestep.loop.run import Run
from samestep.loop.session import Session
from samestep.storage.digest import tensor_digest

Main = Callable[[Run], Any]

EIGHT = [(8, workers) for workers in (1, 2, 3, 4, 8)]
FIVE = [(5, workers) for workers in (1, 2, 3, 5)]


@dataclass(frozen=True)
class Played:
    """What a run came to: all of it must be the same for every number of workers."""

    result: Any
    weights: str
    optimizer: str
    samples: str
    exactly_once: bool
    steps: int

    def as_words(self) -> str:
        """Return text that is equal where every bit is (NaN included)."""
        return repr((plain(self.result), self.weights, self.optimizer, self.samples, self.exactly_once, self.steps))


def plain(value: Any) -> Any:
    """Return `value` with floats in hexadecimal and tensors as lists or digests, so that text tells every bit."""
    if isinstance(value, torch.Tensor) and value.numel() > 64:
        return tensor_digest(value)
    if isinstance(value, torch.Tensor):
        return [str(value.dtype), list(value.shape), plain(value.flatten().tolist())]
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, dict):
        return {key: plain(value[key]) for key in sorted(value, key=str)}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def play_one(group: Group, main: Main, replicas: int, seed: int = 0, keeping: Keeping | None = None) -> Played:
    """Play `main` as one worker of `group`."""
    seed_start(seed)
    session = Session(Recipe(replicas=replicas, seed=seed), keeping or Keeping(), group)
    result = main(Run(session))
    facts = session.finish(result)
    return Played(
        result=result,
        weights=facts["weights_digest"],
        optimizer=facts["optimizer_digest"],
        samples=facts["samples_digest"],
        exactly_once=facts["samples_exactly_once"],
        steps=facts["steps"],
    )


def play(main: Main, replicas: int, workers: int, **settings: Any) -> Played:
    """Play `main` on `workers` workers: alone, or as threads; see that all of them came to the same."""
    if workers == 1:
        return play_one(Solo(), main, replicas, **settings)
    played = run_threads(lambda group: play_one(group, main, replicas, **settings), workers)
    for rank, other in enumerate(played):
        assert other.as_words() == played[0].as_words(), f"worker {rank} of {workers} came to something else"
    return played[0]


def assert_same_bits(main: Main, fleets: Iterable[tuple[int, int]], **settings: Any) -> Played:
    """The law: `main` comes to the same bits at every (replicas, workers), for equal numbers of replicas."""
    first: dict[int, Played] = {}
    for replicas, workers in fleets:
        played = play(main, replicas, workers, **settings)
        assert played.exactly_once, f"{workers} workers did not read each sample exactly once"
        known = first.setdefault(replicas, played)
        assert known.as_words() == played.as_words(), f"{workers} workers differ from 1, at {replicas} replicas"
    return next(iter(first.values()))


@contextmanager
def replaced(owner: Any, name: str, new: Any) -> Iterator[None]:
    """Put `new` in place of an attribute for a while: a planted fault."""
    old = owner.__dict__[name] if isinstance(owner, type) else getattr(owner, name)
    setattr(owner, name, new)
    try:
        yield
    finally:
        setattr(owner, name, old)


def shards_of_batch(size: int, replicas: int) -> Sequence[slice]:
    """Return the shards of a batch, by the definition in the promise: runs as even as can be, in order."""
    return [slice(r * size // replicas, (r + 1) * size // replicas) for r in range(replicas)]
