"""Shards are the same whoever reads them, errors come in their place, and loader processes leave nothing behind."""

import os
import random
import signal
import subprocess
import sys
import time
import traceback
from itertools import count, islice
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import samestep.errors
from samestep.core.randomness import key, seed_sample
from samestep.data.loading import Request, Shard, load
from samestep.data.permutation import Permutation
from samestep.data.proof import Coverage, Proof, SampleCount
from samestep.data.source import as_source
from samestep.data.split import schedule, shard_bounds
from samestep.data.tensors import leaves_of
from samestep.errors import DataError, SettingsError


def request(*ids, epoch=0):
    return Request(epoch, tuple(np.array(one, dtype=np.int64) for one in ids))


def requests_of(num_samples, batch_size, num_replicas, epochs=1):
    for batch in schedule(num_samples, batch_size, epochs=epochs):
        order = Permutation(num_samples, key(6, 0, batch.epoch))
        bounds = shard_bounds(batch.start, batch.stop, num_replicas)
        yield Request(batch.epoch, tuple(order.ids(start, stop) for start, stop in bounds))


def loading(data, requests, loaders, collate=None):
    return load(as_source(data, collate), requests, loaders=loaders, seed=3, seed_sample=seed_sample)


def bits_of(shards):
    return [
        None
        if shard is None
        else (shard.ids.tolist(), [leaf.tolist() for leaf in leaves_of(shard.batch, torch.Tensor)])
        for shard in shards
    ]


class Augmented:
    """Draws from every global generator."""

    def __init__(self, num_samples=40):
        self.num_samples = num_samples

    def __len__(self):
        return self.num_samples

    def __getitem__(self, sample):
        noise = torch.randn(3, 5)
        return noise @ noise.t(), np.random.rand(4), random.random(), sample


def test_shards_do_not_depend_on_loaders():
    runs = [
        [bits_of(shards) for shards in loading(Augmented(), requests_of(40, 7, 3, epochs=2), loaders)]
        for loaders in (0, 1, 2)
    ]
    assert len(runs[0]) == 12
    assert runs[0] == runs[1] == runs[2]
    noises = [str(shard[1][0]) for step in runs[0] for shard in step if shard]
    assert len(set(noises)) == len(noises), "augmentation repeats"


@pytest.mark.parametrize(
    "data", [Augmented(), (torch.randn(40, 3), np.random.rand(40, 3, 3))], ids=["items", "columns"]
)
@pytest.mark.parametrize("loaders", [0, 1])
def test_shards_own_aligned_memory(data, loaders):
    for shards in loading(data, requests_of(40, 7, 3), loaders):
        for shard in shards:
            for tensor in leaves_of(shard.batch, torch.Tensor):
                assert tensor.data_ptr() % 64 == 0
                assert tensor.storage_offset() == 0
                tensor.add_(1)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 50), st.integers(1, 9), st.integers(1, 9))
def test_each_sample_exactly_once(num_samples, batch_size, num_replicas, num_steps):
    batches = list(schedule(num_samples, batch_size, steps=num_steps))
    coverage, read = Coverage(num_samples), SampleCount()
    order_of = {epoch: Permutation(num_samples, key(6, 0, epoch)) for epoch in range(num_steps)}
    requests = (
        Request(
            b.epoch, tuple(order_of[b.epoch].ids(*bounds) for bounds in shard_bounds(b.start, b.stop, num_replicas))
        )
        for b in batches
    )
    for batch, shards in zip(batches, loading(torch.arange(num_samples), requests, 0), strict=True):
        coverage.add(batch)
        assert len(shards) == num_replicas
        for shard in filter(None, shards):
            assert shard.batch.tolist() == shard.ids.tolist()
            assert shard.size == len(shard.batch) > 0
            read += SampleCount.of(batch.epoch, shard.ids)
    assert Proof.of(coverage, read, order_of.__getitem__).holds


@pytest.mark.parametrize("loaders", [0, 1, 2])
def test_empty_shards_requests_and_runs(loaders):
    data = torch.arange(9)
    requests = [request([1, 2], [], [3]), request([], []), request(), request([4])]
    steps = list(loading(data, requests, loaders))
    assert [[None if s is None else s.ids.tolist() for s in step] for step in steps] == [
        [[1, 2], None, [3]],
        [None, None],
        [],
        [[4]],
    ]
    assert all(isinstance(s, Shard) and s.ids.dtype == np.int64 for step in steps for s in step if s)
    assert list(loading(data, [], loaders)) == []


@pytest.mark.parametrize("loaders", [1, 2])
def test_requests_may_be_endless_and_are_read_ahead_by_two_per_loader(loaders):
    taken = []

    def endless():
        for i in count():
            taken.append(i)
            yield request([i % 5])

    shards = loading(torch.arange(5), endless(), loaders)
    assert [step[0].ids[0] for step in islice(shards, 7)] == [0, 1, 2, 3, 4, 0, 1]
    assert len(taken) == 7 + 2 * loaders
    shards.close()


def test_without_loaders_nothing_is_read_ahead():
    taken = []
    shards = loading(torch.arange(5), (taken.append(i) or request([i]) for i in range(5)), 0)
    next(shards)
    assert taken == [0]


@pytest.mark.parametrize("loaders", [0, 2])
def test_many_samples_in_one_request(loaders):
    """More ids than a pipe holds, on the way there and back, several times over."""
    ids = np.arange(200_000)
    requests = [request(ids[:100_000], ids[100_000:]) for _ in range(6)]
    for shards in loading(torch.arange(200_000), requests, loaders):
        assert [int(shard.batch[-1]) for shard in shards] == [99_999, 199_999]


@pytest.mark.parametrize("loaders", [0, 1])
def test_many_replicas_and_bulky_texts(loaders):
    """Answers larger than a pipe holds, while requests for more go out."""
    data = [f"{i} " + "x" * 5000 for i in range(600)]
    requests = [request(*([i] for i in range(600))) for _ in range(4)]
    for shards in loading(data, requests, loaders):
        assert [shard.batch[0].split()[0] for shard in shards] == [str(i) for i in range(600)]


def test_loaders_leave_the_random_generators_alone():
    torch.manual_seed(1)
    np.random.seed(2)
    random.seed(3)
    before = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    assert len(list(loading(Augmented(), requests_of(40, 7, 3), 2))) == 6
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (str(np.random.get_state()), random.getstate()) == before[1:]


class Facts(Augmented):
    """Each sample tells where it was read."""

    def __getitem__(self, sample):
        maps = Path("/proc/self/maps").read_text()
        return os.getpid(), torch.get_num_threads(), "/dev/shm" in maps


def test_loader_processes_run_one_thread_and_use_no_named_memory():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        steps = list(loading(Facts(), requests_of(40, 4, 2), 2))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    pids, threads, named = (torch.cat([s.batch[i] for step in steps for s in step]) for i in range(3))
    assert len(set(pids.tolist())) == 2
    assert os.getpid() not in pids.tolist()
    assert set(threads.tolist()) == {1}
    assert not named.any()


class Fails(Augmented):
    def __init__(self, make_error):
        super().__init__()
        self.make_error = make_error

    def __getitem__(self, sample):
        if sample == 17:
            raise self.make_error()
        return sample


class Picky(Exception):
    """Cannot be rebuilt from its arguments, nor sent."""

    def __init__(self, one, two):
        super().__init__(f"{one} {two}")
        self.hook = lambda: one


def failure(data, loaders, collate=None, requests=None):
    seen: list[int] = []
    shards = loading(data, requests or [request([i]) for i in range(40)], loaders, collate)
    with pytest.raises(DataError) as caught:
        seen.extend(step[0].ids[0] for step in shards)
    return caught.value, seen


@pytest.mark.parametrize("kind", [ValueError, Picky, StopIteration])
def test_errors_are_the_same_with_loaders_and_come_in_their_place(kind):
    def make_error():
        return kind("broken", "file")

    inline, seen = failure(Fails(make_error), 0)
    assert type(inline.__cause__) is kind
    assert seen == list(range(17))
    for loaders in (1, 2):
        ahead, seen_ahead = failure(Fails(make_error), loaders)
        assert str(ahead) == str(inline)
        assert seen_ahead == seen
        text = "".join(traceback.format_exception(ahead))
        assert "in __getitem__" in text
        assert "raise self.make_error()" in text
        assert "source.py" not in str(ahead.__cause__), "our own frames stand above the user's"


def test_errors_of_collate_come_with_their_traceback():
    def collate(samples):
        raise KeyError("label")

    ahead, _ = failure(Augmented(), 1, collate)
    assert str(ahead) == str(failure(Augmented(), 0, collate)[0])
    assert 'raise KeyError("label")' in str(ahead.__cause__)


@pytest.mark.parametrize("loaders", [0, 2])
def test_errors_in_making_requests_come_in_their_place(loaders):
    def requests():
        yield from (request([i]) for i in range(5))
        raise SettingsError("batch_size is 0 for step 5")

    seen: list[int] = []
    shards = loading(torch.arange(9), requests(), loaders)
    with pytest.raises(SettingsError, match="step 5"):
        seen.extend(step[0].ids[0] for step in shards)
    assert seen == [0, 1, 2, 3, 4]


def test_a_batch_that_cannot_be_sent_is_an_error():
    def collate(samples):
        return {"x": torch.zeros(3), "open": (lambda: samples)}

    error, _ = failure(Augmented(), 1, collate, [request([4, 5])])
    assert "sample" in str(error)
    assert "4, 5" in str(error)
    assert "pickle" in str(error)
    assert "loaders=0" in str(error)


class Dies(Augmented):
    def __init__(self, how):
        super().__init__()
        self.how = how

    def __getitem__(self, sample):
        if sample == 17:
            if self.how == "exit":
                os._exit(5)
            if self.how == "sys.exit":
                sys.exit(6)
            os.kill(os.getpid(), signal.SIGKILL)
        return sample


@pytest.mark.parametrize(
    ("how", "words"), [("kill", "signal 9 (Killed)"), ("exit", "exit code 5"), ("sys.exit", "exit code 6")]
)
def test_a_loader_that_dies_is_an_error_in_its_place(how, words, capfd):
    error, seen = failure(Dies(how), 2)
    assert words in str(error)
    assert "sample 17." in str(error)
    assert seen == list(range(17))


_elsewhere: list[psutil.Process] = []


@pytest.fixture(autouse=True)
def know_other_children():
    """Other tests of the session may have a helper process at work."""
    _elsewhere[:] = psutil.Process().children()


def loaders_here() -> list[psutil.Process]:
    """Return the child processes that this test started."""
    return [child for child in psutil.Process().children() if child not in _elsewhere]


def test_ctrl_c_does_not_end_loaders():
    shards = loading(torch.arange(40), requests_of(40, 2, 1), 2)
    next(shards)
    for child in loaders_here():
        child.send_signal(signal.SIGINT)
    assert len(list(shards)) == 19


class Blocks(Augmented):
    def __getitem__(self, sample):
        if sample:
            signal.pause()
        return sample


@pytest.mark.parametrize("ending", ["close", "forget", "error"])
def test_closing_ends_loaders_inside_a_sample(ending):
    """A sample that never returns: only ending its process ends this test."""
    shards = loading(Blocks(), [request([i]) for i in range(40)], 2)
    assert next(shards)[0].ids.tolist() == [0]
    assert len(loaders_here()) == 2
    if ending == "close":
        shards.close()
    elif ending == "forget":
        del shards
    else:
        with pytest.raises(ZeroDivisionError):
            shards.throw(ZeroDivisionError())
    assert loaders_here() == []


def test_nothing_starts_before_the_first_shard_is_asked_for():
    shards = loading(torch.arange(40), requests_of(40, 2, 1), 2)
    assert loaders_here() == []
    shards.close()
    assert list(shards) == []


def test_two_loadings_at_once_do_not_end_each_other():
    one = loading(torch.arange(40), requests_of(40, 2, 1), 1)
    next(one)
    other = loading(torch.arange(40), requests_of(40, 2, 1), 1)
    next(other)
    other.close()
    assert len(list(one)) == 19


ORPHANS = """
import os, signal, sys
import numpy as np, psutil
from samestep.core.randomness import seed_sample
from samestep.data.loading import Request, load
from samestep.data.source import as_source

class Blocks:
    def __len__(self):
        return 9
    def __getitem__(self, sample):
        if sample:
            signal.pause()
        return sample

requests = [Request(0, (np.array([i]),)) for i in range(9)]
shards = load(as_source(Blocks()), requests, loaders=2, seed=0, seed_sample=seed_sample)
next(shards)
print(*(child.pid for child in psutil.Process().children()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_loaders_die_with_their_worker(tmp_path):
    source = str(Path(samestep.errors.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": source, "TMPDIR": str(tmp_path)}
    worker = subprocess.run(
        [sys.executable, "-c", ORPHANS], env=environment, capture_output=True, text=True, check=False
    )
    assert worker.returncode == -signal.SIGKILL, worker.stderr
    pids = [int(pid) for pid in worker.stdout.split()]
    assert len(pids) == 2
    while any(alive(pid) for pid in pids):
        time.sleep(0.01)
    assert list(tmp_path.iterdir()) == []


def alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("loaders", [-1, 1.5, True, None, "2"])
def test_impossible_numbers_of_loaders_are_refused(loaders):
    with pytest.raises(SettingsError, match="loaders="):
        loading(torch.arange(3), [], loaders)
