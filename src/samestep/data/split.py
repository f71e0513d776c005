"""Positions of an epoch's order -> steps -> shards. Pure arithmetic: no torch, no I/O.

epoch 0                              epoch 1
0        B        2B      n          0        B
|--step 0--|--step 1--|-2-|          |--step 3--| ...        batches: `schedule`
|r0|r1|r2|r3|                                                shards of a batch: `shard_bounds`
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count, pairwise
from operator import index

from samestep.errors import SettingsError


def shard_bounds(start: int, stop: int, num_replicas: int) -> list[tuple[int, int]]:
    """Split positions start .. stop-1 into one run per replica, as even as can be; runs may be empty.

    Args:
        start: first position.
        stop: one after the last position.
        num_replicas: number of runs.

    Returns:
        (start, stop) of each replica's run, in replica order.
    """
    size = stop - start
    cuts = [start + r * size // num_replicas for r in range(num_replicas + 1)]
    return list(pairwise(cuts))


@dataclass(frozen=True, slots=True)
class Slice:
    """The batch of one step: positions start .. stop-1 of an epoch's order.

    Attributes:
        number: the step's number, counted over the whole run.
        epoch: the epoch's number.
        start: first position.
        stop: one after the last position.
        ends_epoch: whether no batch of this epoch follows.
    """

    number: int
    epoch: int
    start: int
    stop: int
    ends_epoch: bool

    @property
    def size(self) -> int:
        """Number of samples in the batch."""
        return self.stop - self.start


def schedule(
    num_samples: int,
    batch_size: int | Callable[[int], int],
    *,
    first_step: int = 0,
    first_epoch: int = 0,
    epochs: int | None = None,
    steps: int | None = None,
    drop_last: bool = False,
) -> Iterator[Slice]:
    """Return the batches of a run of steps, lazily.

    An epoch begins at position 0 and its last batch is short, unless `drop_last` leaves it out.

    Args:
        num_samples: samples per epoch.
        batch_size: samples per step, or a function of the step's number; with `drop_last` it may be asked for the
            step after the last one.
        first_step: number of the first step.
        first_epoch: number of the first epoch.
        epochs: how many epochs to run; or
        steps: how many steps to run, across epochs.
        drop_last: leave out an epoch's last batch where it would be short.

    Raises:
        SettingsError: settings that clash; also while iterating, where `batch_size` is a function.
    """
    if (epochs is None) == (steps is None):
        given = "neither epochs nor steps" if epochs is None else f"both epochs={epochs} and steps={steps}"
        raise SettingsError(f"You set {given}; set exactly one of them to say how long to train.")
    _check_length("epochs" if steps is None else "steps", epochs if steps is None else steps)
    if num_samples < 1:
        raise SettingsError("The data set is empty: it has 0 samples, so there is no batch to make. Give it samples.")
    if not callable(batch_size):
        _check_batch_size(batch_size, "")
        batch_size = index(batch_size)
        _check_fits(batch_size, num_samples, drop_last, "")
    numbers = range(first_step, first_step + steps) if steps is not None else count(first_step)
    which = range(first_epoch, first_epoch + epochs) if epochs is not None else count(first_epoch)
    return _slices(_Sizes(batch_size, num_samples, drop_last), iter(numbers), which)


class _Sizes:
    """The batch size of every step, checked."""

    def __init__(self, batch_size: int | Callable[[int], int], num_samples: int, drop_last: bool):
        self._batch_size = batch_size
        self._known = (-1, 0)
        self.num_samples = num_samples
        self.drop_last = drop_last

    def at(self, number: int) -> int:
        """Return the batch size of step `number`. A function is asked once per step."""
        if not callable(self._batch_size):
            return self._batch_size
        if self._known[0] != number:
            size = self._batch_size(number)
            _check_batch_size(size, f" for step {number}")
            self._known = (number, index(size))
        return self._known[1]

    def end_epoch(self, number: int, stop: int) -> bool:
        """Return whether no batch can follow step `number`, which ends at position `stop`."""
        rest = self.num_samples - stop
        return rest == 0 or (self.drop_last and rest < self.at(number + 1))


def _slices(sizes: _Sizes, numbers: Iterator[int], epochs: Iterable[int]) -> Iterator[Slice]:
    for epoch in epochs:
        stop, ends = 0, False
        while not ends:
            number = next(numbers, None)
            if number is None:
                return
            start, size = stop, sizes.at(number)
            if start == 0:
                _check_fits(size, sizes.num_samples, sizes.drop_last, f" for step {number}")
            stop = min(start + size, sizes.num_samples)
            ends = sizes.end_epoch(number, stop)
            yield Slice(number, epoch, start, stop, ends)


def _check_length(name: str, length: int | None) -> None:
    if length is None or not _is_int(length) or length < 0:
        raise SettingsError(f"You set {name}={length!r}; it must be a whole number, 0 or more.")


def _check_batch_size(size: int, where: str) -> None:
    if not _is_int(size) or size < 1:
        raise SettingsError(
            f"batch_size is {size!r}{where}; it must be a whole number of samples, 1 or more, counted over all "
            f"replicas."
        )


def _check_fits(size: int, num_samples: int, drop_last: bool, where: str) -> None:
    if drop_last and size > num_samples:
        raise SettingsError(
            f"batch_size={size}{where} is larger than the data set of {num_samples} samples, and drop_last=True drops "
            f"such a batch, so there would be no step at all. Use a batch_size of at most {num_samples}, or "
            f"drop_last=False."
        )


def _is_int(value: object) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)
