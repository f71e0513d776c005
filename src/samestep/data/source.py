"""Sources: what holds the samples, behind one method that returns the batch of a shard."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset, default_collate

from samestep.data.tensors import aligned, leaves_of, map_leaves, rows_of, torch_dtype_of
from samestep.errors import DataError, SettingsError

SeedSample = Callable[[int, int, int], None]
"""Seeds the global generators from (seed, epoch, sample id)."""

_COLUMN = (torch.Tensor, np.ndarray)
_MAX_NAMED = 8
_MAX_WORDS = 200


class BadSample(NamedTuple):
    """A sample that cannot be read.

    Attributes:
        sample: its id.
        error: what its reading ended with, on one line: "ValueError: broken file".
    """

    sample: int
    error: str


class Source(ABC):
    """Samples 0 .. num_samples-1.

    Attributes:
        num_samples: number of samples.
    """

    num_samples: int

    def __len__(self) -> int:
        return self.num_samples

    @abstractmethod
    def fetch(self, ids: np.ndarray, seed: int, epoch: int, seed_sample: SeedSample) -> Any:
        """Return the batch of samples `ids`; each tensor in it owns its memory, 64-byte aligned.

        Where user code runs, the global generators of torch, NumPy and Python are seeded before each sample and
        left as the last one's code leaves them: the caller seeds again what runs next.

        Args:
            ids: sample ids, int64, not empty.
            seed: the run's seed.
            epoch: the epoch's number.
            seed_sample: seeds the global generators for one sample.

        Raises:
            DataError: a sample or the collate function failed; the cause is the original exception.
        """

    def read_alone(self, sample: int, seed: int, epoch: int, seed_sample: SeedSample) -> None:
        """Read one sample, to see whether it can be read; the generators are seeded as in `fetch`.

        Raises:
            Exception: it cannot; a DataError's cause is the original exception.
        """
        self.fetch(np.array([sample], dtype=np.int64), seed, epoch, seed_sample)

    def bad_among(self, ids: np.ndarray, seed: int, epoch: int, seed_sample: SeedSample) -> list[BadSample]:
        """Return those of samples `ids` whose reading, each alone, fails twice in a row.

        Raises:
            Exception: memory ran out, which says nothing about a sample.
        """
        bad = []
        with _one_thread():
            for sample in ids.tolist():
                # A second try, so that a file system that fails for a moment changes no result.
                for is_last in (False, True):
                    try:
                        self.read_alone(sample, seed, epoch, seed_sample)
                        break
                    except Exception as error:
                        cause = error.__cause__ if isinstance(error, DataError) and error.__cause__ else error
                        if isinstance(cause, MemoryError):
                            raise
                        if is_last:
                            bad.append(BadSample(sample, _in_a_line(cause)))
        return bad


class Columns(Source):
    """Tensors and arrays in memory (or mapped files), one row per sample. No user code runs in `fetch`.

    Args:
        columns: a tensor, an array, or a tree of them with equal lengths; tensors are used without their gradients.

    Raises:
        SettingsError: lengths differ, or a column cannot be one.
    """

    def __init__(self, columns: Any):
        self._columns = map_leaves(columns, torch.Tensor, torch.Tensor.detach)
        self.num_samples = _length_of(columns)

    def fetch(self, ids: np.ndarray, seed: int, epoch: int, seed_sample: SeedSample) -> Any:
        """Return rows `ids` of every column, in the columns' own structure."""
        return map_leaves(self._columns, _COLUMN, lambda column: rows_of(column, ids))

    def __getitem__(self, sample: int) -> Any:
        return map_leaves(self._columns, _COLUMN, lambda column: column[sample])


class Items(Source):
    """A map-style data set: `data[i]` is called for each sample, and `collate` makes a batch of the list.

    A data set with `__getitems__` is given all ids of a shard at once, under the first one's seed.

    Args:
        data: has `__len__` and `__getitem__`.
        collate: list of samples to batch; torch's default if None.
    """

    def __init__(self, data: Any, collate: Callable[[list], Any] | None = None):
        self.num_samples = len(data)
        self._data = data
        self._collate = default_collate if collate is None else collate
        self._takes_lists = _takes_lists(data)

    def fetch(self, ids: np.ndarray, seed: int, epoch: int, seed_sample: SeedSample) -> Any:
        """Return the collated samples `ids`."""
        names = ids.tolist()
        with _one_thread():
            if self._takes_lists:
                seed_sample(seed, epoch, names[0])
                samples = self._items(names)
            else:
                samples = []
                for sample in names:
                    seed_sample(seed, epoch, sample)
                    samples.append(self._item(sample))
            return map_leaves(self._collated(samples, names), torch.Tensor, aligned)

    def read_alone(self, sample: int, seed: int, epoch: int, seed_sample: SeedSample) -> None:
        """Read one sample, without collating it."""
        seed_sample(seed, epoch, sample)
        if self._takes_lists:
            self._find_failure(sample)
        else:
            self._item(sample)

    def _item(self, sample: int) -> Any:
        try:
            return self._data[sample]
        except Exception as error:
            raise self._failure(sample, error) from error

    def _items(self, names: list[int]) -> list:
        try:
            samples = self._data.__getitems__(names)
        except Exception as error:
            for sample in names:
                self._find_failure(sample)
            raise DataError(
                f"Reading {named(names)} of your data ({type(self._data).__name__}) together failed, though each one "
                f"alone can be read: {_in_words(error)}. Mend its `__getitems__`."
            ) from error
        if len(samples) != len(names):
            raise DataError(
                f"`__getitems__` of your data ({type(self._data).__name__}) returned {len(samples)} samples when asked "
                f"for {len(names)}: {named(names)}. It must return one for each id."
            )
        return samples

    def _find_failure(self, sample: int) -> None:
        try:
            self._data.__getitems__([sample])
        except Exception as error:
            raise self._failure(sample, error) from error

    def _failure(self, sample: int, error: Exception) -> DataError:
        name = type(self._data).__name__
        if isinstance(error, IndexError):
            return DataError(
                f"Sample {sample} of your data ({name}) failed: {_in_words(error)}. Its length is given as "
                f"{self.num_samples}, so samples 0 .. {self.num_samples - 1} must exist. If sample {sample} does not, "
                f"make __len__ return what __getitem__ can give; else mend the code that looked it up."
            )
        return DataError(
            f"Sample {sample} of your data ({name}) failed: {_in_words(error)}. Mend this sample or leave it out; "
            f"data[{sample}] alone shows the error."
        )

    def _collated(self, samples: list, names: list[int]) -> Any:
        try:
            return self._collate(samples)
        except Exception as error:
            what = "give collate=, a function that makes a batch of a list of samples"
            if self._collate is not default_collate:
                what = "mend the collate function you gave"
            raise DataError(
                f"Collating {named(names)} of your data ({type(self._data).__name__}) into one shard failed: "
                f"{_in_words(error)}. If the samples are as you want them, {what}."
            ) from error


def as_source(data: Any, collate: Callable[[list], Any] | None = None) -> Source:
    """Return a source over what users have.

    Args:
        data: a tensor, a NumPy array, a tuple or dict of them with equal lengths, a TensorDataset, any map-style
            data set (`__len__` and `__getitem__`: torch, Hugging Face, a list), or a `Source`.
        collate: makes a batch of a list of samples; torch's `default_collate` if None.

    Raises:
        SettingsError: `data` has no known length or cannot be asked for one sample; the message says what to use.
    """
    if collate is not None and not callable(collate):
        raise SettingsError(f"collate must be a function of a list of samples; you set collate={collate!r}.")
    if isinstance(data, Source):
        if collate is not None:
            raise SettingsError(
                f"You set collate= beside a {type(data).__name__}, which makes its batches itself. Leave collate out, "
                f"or give the data that the source was made of."
            )
        return data
    columns = _columns_in(data)
    if columns is None:
        _refuse_other_than_map_style(data)
        return Items(data, collate)
    source = Columns(columns)
    return source if collate is None else Items(source, collate)


def _columns_in(data: Any) -> Any:
    """Return the columns that `data` consists of, or None where it is a data set of samples."""
    if type(data) is TensorDataset:
        return list(data.tensors)
    if isinstance(data, torch.Tensor):
        return data
    if isinstance(data, np.ndarray):
        return data if _fits_torch(data) else None
    if isinstance(data, Mapping):
        return data
    return data if isinstance(data, tuple) and leaves_of(data, _COLUMN) else None


def _length_of(columns: Any) -> int:
    lengths: dict[str, int] = {}
    _check_columns(columns, "the data", lengths)
    if len(set(lengths.values())) != 1:
        found = ", ".join(f"{where}: {length}" for where, length in lengths.items())
        raise SettingsError(f"All columns must hold the same number of samples; yours have {found or 'no columns'}.")
    return next(iter(lengths.values()))


def _check_columns(tree: Any, where: str, lengths: dict[str, int]) -> None:
    if isinstance(tree, _COLUMN):
        if tree.ndim == 0:
            raise SettingsError(f"{where} is a single number; its first dimension must count the samples.")
        if isinstance(tree, np.ndarray) and not _fits_torch(tree):
            raise SettingsError(f"{where} is an array of {tree.dtype}, which torch cannot hold. Convert it to numbers.")
        lengths[where] = len(tree)
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            _check_columns(value, f"{where}[{key!r}]", lengths)
    elif isinstance(tree, tuple) or (isinstance(tree, list) and leaves_of(tree, _COLUMN)):
        for i, value in enumerate(tree):
            _check_columns(value, f"{where}[{i}]", lengths)
    else:
        raise SettingsError(
            f"{where} is of type {type(tree).__name__}, but a tuple or dict given as data must hold columns: tensors "
            f"or NumPy arrays of equal length. Convert it, or give a list with one entry per sample."
        )


def _fits_torch(array: np.ndarray) -> bool:
    try:
        torch_dtype_of(array)
    except (TypeError, ValueError):
        return False
    return True


def _refuse_other_than_map_style(data: Any) -> None:
    name = type(data).__name__
    if isinstance(data, DataLoader):
        raise SettingsError("You gave a DataLoader; give its data set (`loader.dataset`), batch_size= and loaders=.")
    if hasattr(data, "iloc"):
        raise SettingsError(f"You gave a {name}, whose rows [] does not return. Give data.to_numpy(), or its columns.")
    length = None
    if hasattr(data, "__getitem__") and not isinstance(data, IterableDataset):
        try:
            length = len(data)
        except (TypeError, NotImplementedError):
            length = None
    if length is not None:
        return
    what = "cannot be asked for one sample by its number, or does not know its length"
    if isinstance(data, Iterable) or hasattr(data, "__next__"):
        what = "can only be read in its own order"
    raise SettingsError(
        f"You gave data of type {name}, which {what}, so no step could be split, shuffled or resumed exactly. Give a "
        f"map-style data set with __len__ and __getitem__, or list(data) where it fits in memory."
    )


def _takes_lists(data: Any) -> bool:
    """Return whether `__getitems__` reads a shard at once; torch's Subset has one that asks item by item."""
    while type(data) is Subset:
        data = data.dataset
    return callable(getattr(data, "__getitems__", None))


@contextmanager
def _one_thread() -> Any:
    """Let user code run on one torch thread, as it does in loader processes: more threads give other last bits."""
    num_threads = torch.get_num_threads()
    if num_threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def named(names: list[int]) -> str:
    """Return "samples 3, 5, 7 and 29 more"."""
    shown = ", ".join(str(name) for name in names[:_MAX_NAMED])
    more = len(names) - _MAX_NAMED
    return f"sample{'s' if len(names) > 1 else ''} {shown}" + (f" and {more} more" if more > 0 else "")


def _in_a_line(error: BaseException) -> str:
    """Return the error's kind and text, short enough to be told to all and recorded."""
    line = " ".join(_in_words(error).split()).encode("utf-8", "backslashreplace").decode()
    return line if len(line) <= _MAX_WORDS else line[:_MAX_WORDS] + " ..."


def _in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().removesuffix(".").removesuffix(":")
