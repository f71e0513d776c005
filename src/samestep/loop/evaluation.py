"""Exact evaluation: whole batches are divided among workers, each sample once, nothing padded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from samestep.core.calls import Calls
from samestep.core.randomness import seed_evaluation, seed_sample
from samestep.core.worker import Worker
from samestep.data.loading import Request, load
from samestep.data.source import Source
from samestep.errors import UsageError
from samestep.storage import wire


@contextmanager
def evaluating(modules: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Put modules in eval mode without gradients; give each submodule its mode back afterwards."""
    modes = [(m, m.training) for module in modules for m in module.modules()]
    try:
        for module in modules:
            module.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


class Evaluation:
    """One call of `run.mean` or `run.gather`, as one worker sees it."""

    def __init__(self, source: Source, batch_size: int, worker: Worker, seed: int, number: int):
        """Prepare to evaluate.

        Args:
            source: the data.
            batch_size: samples that the function is given at a time (fewer in the last batch).
            worker: this worker; it takes a run of the batches.
            seed: of the run.
            number: of the call, so that every evaluation draws other random numbers.
        """
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise UsageError(f"batch_size={batch_size!r}; it must be a whole number of samples, 1 or more.")
        if not len(source):
            raise UsageError("There is nothing to evaluate: the data is empty.")
        self._source = source
        self._size = batch_size
        self._worker = worker
        self._seed = seed
        self._number = number
        num_batches = -(-len(source) // batch_size)
        self._mine = range(worker.rank * num_batches // worker.size, (worker.rank + 1) * num_batches // worker.size)

    def mean(self, fn: Callable[[Any], Any], calls: Calls, where: str) -> float | dict[str, float]:
        """Return the mean of `fn` over all samples, added in batch order in float64. Collective."""
        entries = [[count, *self._sums(fn(batch), count)] for count, batch in self._batches()]
        met = [entry for value, _ in calls.meet("run.mean", where, entries) for entry in value]
        total = sum(entry[0] for entry in met)
        names = met[0][1]
        for entry in met:
            if entry[1] != names:
                raise UsageError(
                    f"run.mean was given {entry[1]} for one batch and {names} for another. Name all alike."
                )
        means = [math.fsum(entry[2][i] for entry in met) / total for i in range(len(names))]
        return means[0] if names == [""] else dict(zip(names, means, strict=True))

    def gather(self, fn: Callable[[Any], Any], calls: Calls, where: str) -> Any:
        """Return the per-item results of `fn` in data order. Collective."""
        parts = []
        for count, batch in self._batches():
            result = fn(batch)
            if isinstance(result, torch.Tensor):
                result = result.detach().cpu()
            if not isinstance(result, torch.Tensor | np.ndarray | list | tuple) or len(result) != count:
                raise UsageError(
                    f"run.gather needs one result per sample: for a batch of {count} samples the function gave "
                    f"{_shown(result)}."
                )
            parts.append(list(result) if isinstance(result, tuple) else result)
        met = calls.meet("run.gather", where, None, wire.pack(parts))
        return _concatenated([part for _, frame in met for part in wire.unpack(frame)])

    def _batches(self) -> Iterator[tuple[int, Any]]:
        """Yield (samples, batch) of each batch this worker takes."""
        spans = [range(b * self._size, min((b + 1) * self._size, len(self._source))) for b in self._mine]
        requests = (Request(0, (np.arange(s.start, s.stop, dtype=np.int64),)) for s in spans)
        shards = load(self._source, requests, seed=self._seed, seed_sample=seed_sample)
        for number, (shard,) in zip(self._mine, shards, strict=True):
            assert shard is not None
            seed_evaluation(self._seed, self._number, number)
            yield len(shard.ids), on_device(shard.batch, self._worker.device)

    def _sums(self, result: Any, count: int) -> tuple[list[str], list[float]]:
        """Return names and sums over the batch of what the function gave."""
        named = result if isinstance(result, dict) else {"": result}
        items = sorted((str(name), value) for name, value in named.items())
        return [name for name, _ in items], [_sum(value, count) for _, value in items]


def _sum(value: Any, count: int) -> float:
    if isinstance(value, torch.Tensor | np.ndarray):
        values = torch.as_tensor(value).detach().double().cpu()
        if values.dim() == 0:
            return float(values) * count
        if values.shape == (count,):
            return math.fsum(values.tolist())
        raise UsageError(
            f"run.mean needs a scalar mean or one value per sample: for a batch of {count} samples the function gave "
            f"{_shown(value)}."
        )
    if isinstance(value, int | float):
        return float(value) * count
    raise UsageError(f"run.mean needs numbers; the function gave {_shown(value)}.")


def on_device(batch: Any, device: str) -> Any:
    """Return `batch` with its tensors on `device`."""
    if device == "cpu":
        return batch
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return type(batch)((k, on_device(v, device)) for k, v in batch.items())
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(on_device(v, device) for v in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(on_device(v, device) for v in batch)
    return batch


def _concatenated(parts: list[Any]) -> Any:
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(parts)
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)
    return [item for part in parts for item in part]


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor | np.ndarray):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, list | tuple) else "")
