"""Whatever is sent arrives: same bits, same shape, memory without a name."""

import gc
import multiprocessing
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch

from samestep.data import parcel
from samestep.data.parcel import receive, send

Pair = namedtuple("Pair", "left right")


@pytest.fixture
def pipe():
    ends = multiprocessing.Pipe()
    yield ends
    for end in ends:
        end.close()


def there(pipe, value):
    send(pipe[0], value)
    return receive(pipe[1])


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64]
)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (0,), (2, 0), (70, 3)])
def test_dtypes_and_shapes(pipe, dtype, shape):
    tensor = torch.randn(shape).to(dtype)
    arrived = there(pipe, tensor)
    assert arrived.dtype == dtype
    assert arrived.shape == tensor.shape
    assert torch.equal(arrived, tensor)
    assert arrived.data_ptr() % 64 == 0


def test_trees_and_strides(pipe):
    pixels = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    value = {"a": [Pair(pixels, "text")], "b": (torch.randn(5)[1:], torch.ones(1).expand(6)), "c": np.arange(3)}
    arrived = there(pipe, value)
    assert torch.equal(arrived["a"][0].left, pixels)
    assert arrived["a"][0].left.stride() == pixels.stride()
    assert arrived["a"][0].right == "text"
    assert torch.equal(arrived["b"][0], value["b"][0])
    assert torch.equal(arrived["b"][1], torch.ones(6))
    assert np.array_equal(arrived["c"], value["c"])
    every = [arrived["a"][0].left, *arrived["b"]]
    assert all(tensor.data_ptr() % 64 == 0 and tensor.storage_offset() == 0 for tensor in every)


def test_views_of_numbers_and_wishes_for_gradients(pipe):
    numbers = torch.randn(4, dtype=torch.complex64)
    assert torch.equal(there(pipe, numbers.conj()), numbers.conj())
    assert torch.equal(there(pipe, numbers.conj().imag), numbers.conj().imag)
    weight = torch.randn(3, requires_grad=True)
    assert there(pipe, weight).requires_grad
    assert there(pipe, weight).is_leaf


def test_bulk_never_fills_the_pipe(pipe):
    """Nobody reads while 64 MiB are sent: a pipe that carried them would block for good."""
    tensor = torch.arange(16 * 2**20, dtype=torch.int32)
    send(pipe[0], tensor)
    assert torch.equal(receive(pipe[1]), tensor)


def test_short_writes_are_continued(pipe, monkeypatch):
    whole = parcel.os.pwrite
    monkeypatch.setattr(parcel.os, "pwrite", lambda fd, data, at: whole(fd, data[:1000], at))
    tensor = torch.arange(5000)
    assert torch.equal(there(pipe, [tensor, tensor + 1])[1], tensor + 1)


def test_memory_has_no_name_and_is_given_back(pipe):
    def num_maps():
        gc.collect()
        return Path("/proc/self/maps").read_text().count("memfd:samestep-parcel")

    before = num_maps()
    arrived = [there(pipe, torch.randn(1000)) for _ in range(20)]
    assert num_maps() == before + 20
    assert "/dev/shm" not in Path("/proc/self/maps").read_text()
    del arrived
    assert num_maps() == before


def test_writing_to_what_arrived_is_private(pipe):
    tensor = torch.zeros(100)
    arrived = there(pipe, [tensor, torch.ones(100)])
    arrived[0] += 5
    assert tensor.sum() == 0
    assert arrived[1].sum() == 100


def test_what_cannot_be_sent_leaves_the_connection_usable(pipe):
    with pytest.raises(Exception, match="pickle"):
        send(pipe[0], [torch.zeros(3), lambda: 1])
    assert there(pipe, 7) == 7


def test_the_other_end_is_gone(pipe):
    pipe[1].close()
    with pytest.raises(BrokenPipeError):
        send(pipe[0], torch.zeros(3))
    with pytest.raises((EOFError, ConnectionResetError)):
        receive(pipe[0])
