"""Clients: each has data of its own, which is read for it alone and goes nowhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Subset

from samestep.data.source import Columns, Source, as_source
from samestep.errors import SettingsError
from samestep.federated.skew import label_skew

_MAX_NAMED = 8


class Clients:
    """Clients 0 .. num_clients-1, in order, each with its own data set.

    Made by `of`, `made_by`, `by_indices` or `by_label_skew`.

    Attributes:
        num_clients: how many there are.
    """

    def __init__(self, lengths: Sequence[int], data_of: Callable[[int], Any]):
        self.num_clients = len(lengths)
        self._lengths = [int(length) for length in lengths]
        self._data_of = data_of
        if not self._lengths:
            raise SettingsError("There are no clients. Give at least one data set.")
        empty = [client for client, length in enumerate(self._lengths) if length < 1]
        if empty:
            more = f" and {len(empty) - _MAX_NAMED} more" if len(empty) > _MAX_NAMED else ""
            named = ", ".join(str(client) for client in empty[:_MAX_NAMED])
            raise SettingsError(
                f"Client{'s' if len(empty) > 1 else ''} {named}{more} of {self.num_clients} without data: there is "
                f"nothing to train on. Give samples, or leave such clients out."
            )

    @classmethod
    def of(cls, datasets: Sequence[Any]) -> Clients:
        """Return clients with these data sets, one each, in order.

        Args:
            datasets: whatever `run.steps` takes: map-style data sets, tensors, tuples of tensors or arrays.

        Raises:
            SettingsError: data that cannot be read by sample, or is empty; the message names the client.
        """
        datasets = list(datasets)
        return cls([_length_of(data, client) for client, data in enumerate(datasets)], datasets.__getitem__)

    @classmethod
    def made_by(cls, make: Callable[[int], Any], lengths: Sequence[int]) -> Clients:
        """Return clients whose data sets are made when they are read, so that not all are in memory at once.

        Args:
            make: client id -> its data set. Called whenever the client is read; alike each time, on every worker.
            lengths: number of samples of each client.

        Raises:
            SettingsError: a client without data. From `data_of`: a data set of another length.
        """
        lengths = [int(length) for length in lengths]

        def data_of(client: int) -> Any:
            data = make(client)
            length = _length_of(data, client)
            if length != lengths[client]:
                raise SettingsError(
                    f"Client {client} was to have {lengths[client]} samples, but the data made for it has {length}. "
                    f"Make the lengths that you gave and the data agree."
                )
            return data

        return cls(lengths, data_of)

    @classmethod
    def by_indices(cls, data: Any, indices: Sequence[Any]) -> Clients:
        """Return clients that own parts of one data set: for simulations.

        Args:
            data: whatever `run.steps` takes. Rows of tensors and arrays are copied when a client is read.
            indices: for each client the samples that it owns, whole numbers. A sample may have no owner.

        Raises:
            SettingsError: a client without data, a sample that does not exist, or one with two owners.
        """
        source = as_source(data)
        if isinstance(data, Source) and not isinstance(data, Columns):
            raise SettingsError(f"You gave a {type(data).__name__} to divide; give the data that it was made of.")
        owned = [_checked(part, client, source.num_samples) for client, part in enumerate(indices)]
        _check_owners(owned)

        def data_of(client: int) -> Any:
            if isinstance(source, Columns):
                rows = source.fetch(owned[client], 0, 0, lambda seed, epoch, sample: None)
                return tuple(rows) if isinstance(rows, list) else rows
            return Subset(data, owned[client].tolist())

        return cls([len(part) for part in owned], data_of)

    @classmethod
    def by_label_skew(cls, data: Any, labels: Any, num_clients: int, alpha: float, seed: int) -> Clients:
        """Return clients that own parts of one data set, each with its own mixture of labels (Hsu et al. 2019).

        Args:
            data: whatever `run.steps` takes.
            labels: one label per sample, a tensor, array or sequence.
            num_clients: number of clients, at most as many as samples.
            alpha: concentration: 100 nearly alike, 0.1 one or two labels per client.
            seed: another seed deals otherwise. The same clients on every machine.

        Raises:
            SettingsError: fewer samples than clients, or another number of labels than of samples.
        """
        labels = np.asarray(labels)
        num_samples = as_source(data).num_samples
        if len(labels) != num_samples:
            raise SettingsError(f"You gave {len(labels)} labels for {num_samples} samples; give one for each.")
        return cls.by_indices(data, label_skew(labels, num_clients, alpha, seed))

    def __len__(self) -> int:
        return self.num_clients

    def len_of(self, client: int) -> int:
        """Return how many samples a client has."""
        return self._lengths[client]

    def data_of(self, client: int) -> Any:
        """Return a client's data set, for whoever plays that client: whatever `run.steps` takes.

        Raises:
            SettingsError: there is no such client; or what `made_by` says.
        """
        if not 0 <= client < self.num_clients:
            raise SettingsError(f"There is no client {client}; there are {self.num_clients}, from 0.")
        return self._data_of(client)


def _length_of(data: Any, client: int) -> int:
    try:
        return as_source(data).num_samples
    except SettingsError as error:
        raise SettingsError(f"The data of client {client}: {error}") from error


def _checked(part: Any, client: int, num_samples: int) -> np.ndarray:
    ids = np.asarray(part)
    if ids.size == 0:
        return np.empty(0, dtype=np.int64)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise SettingsError(
            f"The indices of client {client} are {ids.dtype} of shape {ids.shape}; give a list of whole numbers."
        )
    if ids.min() < 0 or ids.max() >= num_samples:
        raise SettingsError(
            f"Client {client} owns samples {ids.min()} to {ids.max()}, but the data has samples 0 to {num_samples - 1}."
        )
    return ids.astype(np.int64)


def _check_owners(owned: Sequence[np.ndarray]) -> None:
    if not owned:
        return
    samples = np.concatenate(owned)
    owners = np.repeat(np.arange(len(owned)), [len(part) for part in owned])
    order = np.argsort(samples, kind="stable")
    again = np.flatnonzero(np.diff(samples[order]) == 0)
    if again.size:
        first, second = owners[order[again[0]]], owners[order[again[0] + 1]]
        raise SettingsError(
            f"Sample {samples[order[again[0]]]} is owned by client {first} and again by client {second}. Give each "
            f"sample one owner; for data that clients share, use Clients.of with a data set for each."
        )
