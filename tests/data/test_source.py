"""What users have becomes a source; what cannot be one is refused with words that help."""

import random
import traceback
from collections import namedtuple

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, default_collate

from samestep.core.randomness import seed_sample
from samestep.data.source import Columns, Items, Source, as_source
from samestep.data.tensors import leaves_of
from samestep.errors import DataError, SettingsError

IDS = np.array([5, 0, 11, 5])
X = torch.arange(48, dtype=torch.float32).reshape(12, 4)
Y = torch.arange(12) * 10
Named = namedtuple("Named", "x y")


def assert_aligned(batch):
    for tensor in leaves_of(batch, torch.Tensor):
        assert tensor.data_ptr() % 64 == 0
        assert tensor.storage_offset() == 0


def fetch(source, ids=IDS, seed=1, epoch=2):
    return source.fetch(ids, seed, epoch, seed_sample)


class MapStyle:
    """A map-style data set that owes torch nothing."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, sample):
        assert type(sample) is int
        return self.rows[sample]


class TorchStyle(MapStyle, Dataset):
    pass


class HuggingFaceStyle(MapStyle):
    """Rows by number, columns by name, many rows at once."""

    def __getitem__(self, key):
        if isinstance(key, str):
            return [row[key] for row in self.rows]
        return self.rows[key]

    def __getitems__(self, keys):
        assert all(type(key) is int for key in keys)
        return [self.rows[key] for key in keys]


PAIRS = [(x, int(y)) for x, y in zip(X, Y, strict=True)]
DICTS = [{"x": x, "y": int(y), "name": f"n{y}"} for x, y in zip(X, Y, strict=True)]

ITEMS = {
    "list": PAIRS,
    "tuple of samples": tuple((x.tolist(), int(y)) for x, y in zip(X, Y, strict=True)),
    "map style": MapStyle(PAIRS),
    "torch data set": TorchStyle(PAIRS),
    "dicts": TorchStyle(DICTS),
    "hugging face": HuggingFaceStyle(DICTS),
    "arrays": [(x.numpy(), np.float64(y)) for x, y in zip(X, Y, strict=True)],
    "subset": Subset(TorchStyle(PAIRS), list(range(11, -1, -1))),
    "subset of hugging face": Subset(HuggingFaceStyle(DICTS), list(range(11, -1, -1))),
    "texts": np.array([f"text {i}" for i in range(12)]),
    "tensor data set of a subclass": type("Sub", (TensorDataset,), {})(X, Y),
}

COLUMNS = {
    "tensor": X,
    "array": X.numpy(),
    "array of bytes": np.arange(12, dtype=np.uint8),
    "tuple": (X, Y.numpy()),
    "named tuple": Named(X, Y),
    "dict": {"x": X, "y": Y.numpy()},
    "nested": ({"a": X, "b": (Y,)}, Y.numpy()),
    "tensor data set": TensorDataset(X, Y),
    "read-only array": np.broadcast_to(np.arange(12)[:, None], (12, 5)),
    "no contiguous rows": (X.numpy()[:, ::2], X.t().contiguous().t()),
}


def assert_same(batch, expected):
    assert type(batch) is type(expected)
    if isinstance(batch, torch.Tensor):
        assert batch.dtype == expected.dtype
        assert torch.equal(batch, expected)
    elif isinstance(batch, dict):
        assert list(batch) == list(expected)
        for key in batch:
            assert_same(batch[key], expected[key])
    elif isinstance(batch, list | tuple):
        for one, other in zip(batch, expected, strict=True):
            assert_same(one, other)
    else:
        assert batch == expected


@pytest.mark.parametrize("data", ITEMS.values(), ids=ITEMS)
def test_items_give_the_batch_of_a_plain_loader(data):
    source = as_source(data)
    assert isinstance(source, Items)
    assert len(source) == 12
    expected = next(iter(DataLoader(data, batch_sampler=[IDS.tolist()])))
    assert_same(fetch(source), expected)
    assert_aligned(fetch(source))


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")  # torch's default_collate of our rows
@pytest.mark.parametrize("data", COLUMNS.values(), ids=COLUMNS)
def test_columns_give_what_their_rows_would(data):
    source = as_source(data)
    assert isinstance(source, Columns)
    assert len(source) == 12
    batch = fetch(source)
    rows = [source[int(sample)] for sample in IDS]
    assert_same(default_collate([batch]), default_collate([default_collate(rows)]))
    assert_aligned(batch)


def test_columns_keep_their_structure():
    assert type(fetch(as_source((X, Y)))) is tuple
    assert type(fetch(as_source(Named(X, Y)))) is Named
    assert type(fetch(as_source(TensorDataset(X, Y)))) is list
    assert list(fetch(as_source({"b": X, "a": Y}))) == ["b", "a"]


def test_columns_give_copies_without_gradients():
    data = X.clone().requires_grad_()
    batch = fetch(as_source(data))
    assert not batch.requires_grad
    batch += 1
    assert torch.equal(data, X)


def test_mapped_files_are_columns(tmp_path):
    np.save(tmp_path / "x.npy", X.numpy())
    source = as_source((np.load(tmp_path / "x.npy", mmap_mode="r"), Y))
    assert torch.equal(fetch(source)[0], X[IDS])
    assert_aligned(fetch(source))


def test_collate_of_the_user_gets_a_list_of_samples():
    def collate(samples):
        assert type(samples) is list
        return {"n": len(samples), "y": [sample[1] for sample in samples]}

    for data in (PAIRS, (X, Y), TensorDataset(X, Y), HuggingFaceStyle(PAIRS)):
        batch = fetch(as_source(data, collate))
        assert batch["n"] == 4
        assert [int(y) for y in batch["y"]] == Y[IDS].tolist()


def test_views_that_collate_returns_are_copied():
    memory = torch.zeros(1000)
    batch = fetch(as_source(PAIRS, lambda samples: {"x": memory[1:], "deep": (memory[:10], memory[16:32])}))
    assert_aligned(batch)
    batch["x"] += 1
    batch["deep"][0].add_(1)
    assert memory.sum() == 0


def test_arrays_that_collate_wraps_are_aligned():
    for size in range(1, 40):
        assert_aligned(fetch(as_source(PAIRS, lambda samples, n=size: torch.from_numpy(np.ones(n * 100)))))


def augmented(sample):
    return sample, torch.rand(2).tolist(), np.random.rand(), random.random()


class Augmented(MapStyle):
    def __init__(self, num_samples=30):
        super().__init__(range(num_samples))

    def __getitem__(self, sample):
        return augmented(sample)


def listed(samples):
    return samples


@pytest.mark.parametrize("data", [Augmented(), Subset(Augmented(), range(30))], ids=["plain", "subset"])
def test_augmentation_depends_on_seed_epoch_and_sample_alone(data):
    source = as_source(data, listed)
    alone = {i: fetch(source, np.array([i]))[0] for i in range(30)}
    random.seed(4)
    together = fetch(source, np.array([7, 3, 29, 0]))
    assert together == [alone[7], alone[3], alone[29], alone[0]]
    assert len({sample[1:3].__repr__() for sample in alone.values()}) == 30
    assert fetch(source, np.array([7]), seed=2) != [alone[7]]
    assert fetch(source, np.array([7]), epoch=3) != [alone[7]]


def test_samples_read_together_are_seeded_by_the_first():
    class Together(Augmented):
        def __getitems__(self, samples):
            return [self[sample] for sample in samples]

    source = as_source(Together(), listed)
    assert fetch(source, np.array([3, 4])) == fetch(source, np.array([3, 4]))
    assert fetch(source, np.array([3, 4]))[0] == fetch(source, np.array([3]))[0]


def test_random_collate_is_seeded_too():
    source = as_source((X, Y), lambda samples: torch.rand(3))
    first = fetch(source)
    torch.rand(5)
    assert torch.equal(fetch(source), first)
    assert not torch.equal(fetch(source, epoch=3), first)


def test_user_code_runs_on_one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert fetch(as_source(MapStyle(range(12)), lambda samples: torch.get_num_threads())) == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


class Fails(MapStyle):
    def __init__(self, error, at=11, num_samples=12):
        super().__init__(range(num_samples))
        self.error, self.at = error, at

    def __getitem__(self, sample):
        if sample == self.at:
            raise self.error
        return sample


class FailsTogether(Fails):
    def __getitems__(self, samples):
        if self.at is None and len(samples) > 1:
            raise self.error
        return [self[sample] for sample in samples]


@pytest.mark.parametrize("kind", [Fails, FailsTogether])
def test_a_sample_that_fails_is_named_and_keeps_its_traceback(kind):
    error = ValueError("broken file")
    with pytest.raises(DataError) as caught:
        fetch(as_source(kind(error)))
    assert caught.value.__cause__ is error
    assert "Sample 11 " in str(caught.value)
    assert kind.__name__ in str(caught.value)
    assert "ValueError: broken file" in str(caught.value)
    assert "raise self.error" in "".join(traceback.format_exception(caught.value))


def test_samples_that_fail_only_together_are_named():
    with pytest.raises(DataError, match="samples 5, 0, 11, 5 of your data") as caught:
        fetch(as_source(FailsTogether(ValueError("too many"), at=None)))
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_length_that_lies_is_named():
    class Lies(MapStyle):
        def __len__(self):
            return 20

    with pytest.raises(DataError, match=r"Sample 15 .*IndexError.*given as 20.*make __len__") as caught:
        fetch(as_source(Lies(list(range(12)))), np.array([3, 15]))
    assert isinstance(caught.value.__cause__, IndexError)


def test_too_few_samples_at_once_are_found():
    class Skips(HuggingFaceStyle):
        def __getitems__(self, samples):
            return super().__getitems__(samples)[1:]

    with pytest.raises(DataError, match="returned 3 samples when asked for 4: samples 5, 0, 11, 5"):
        fetch(as_source(Skips(DICTS)))


def test_samples_that_do_not_stack_are_named():
    data = [torch.zeros(3 if i == 11 else 2) for i in range(30)]
    with pytest.raises(DataError, match=r"Collating samples 5, 0, 11, 5 .*give collate=") as caught:
        fetch(as_source(data))
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(DataError, match=r"samples 0, 1, 2, 3, 4, 5, 6, 7 and 22 more "):
        fetch(as_source(data), np.arange(30))


def test_a_collate_that_fails_is_the_users():
    with pytest.raises(DataError, match=r"KeyError: 'x'.*mend the collate function you gave"):
        fetch(as_source(PAIRS, lambda samples: {}["x"]))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)])
def test_the_users_wish_to_stop_is_no_data_error(error):
    with pytest.raises(type(error)):
        fetch(as_source(Fails(error)))


class Stream(IterableDataset):
    def __iter__(self):
        return iter([1, 2])


class StreamWithLength(Stream):
    def __len__(self):
        return 2


class NoLength(Dataset):
    def __getitem__(self, sample):
        return sample


class Frame(MapStyle):
    iloc = None


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (Stream(), ["Stream", "own order", "list(data)", "map-style"]),
        (StreamWithLength(), ["StreamWithLength", "own order"]),
        (iter([1, 2]), ["list_iterator", "list(data)"]),
        ((i for i in range(3)), ["generator", "list(data)"]),
        ({1, 2}, ["set", "list(data)"]),
        (NoLength(), ["NoLength", "does not know its length", "__len__"]),
        (17, ["int", "map-style"]),
        (None, ["NoneType"]),
        (DataLoader(PAIRS), ["DataLoader", "loader.dataset", "loaders="]),
        (Frame([1]), ["Frame", "to_numpy"]),
        ((X, Y[:5]), ["[0]: 12", "[1]: 5", "same number"]),
        ({"x": X, "y": Y[1:]}, ["['x']: 12", "['y']: 11"]),
        ((X, [1, 2]), ["the data[1]", "list", "columns"]),
        ({"train": PAIRS}, ["the data['train']", "list"]),
        ({}, ["no columns"]),
        (torch.tensor(3.0), ["single number"]),
        ((X, np.array(["a"] * 12)), ["the data[1]", "<U1", "Convert"]),
        ((X, np.arange(12, dtype=">i4")), ["the data[1]", ">i4"]),
    ],
)
def test_what_cannot_be_split_is_refused(data, words):
    with pytest.raises(SettingsError) as caught:
        as_source(data)
    assert all(word in str(caught.value) for word in words), caught.value


def test_sources_pass_through():
    source = as_source(PAIRS)
    assert as_source(source) is source
    assert isinstance(source, Source)
    with pytest.raises(SettingsError, match="collate= beside a Items"):
        as_source(source, listed)
    with pytest.raises(SettingsError, match="collate=3"):
        as_source(PAIRS, 3)
