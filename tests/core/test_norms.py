"""Squared norms: right, and a block's sum depends on the block alone."""

import numpy as np
import pytest
import torch

from samestep.core import norms
from samestep.core.layout import GRANULE


def block_squares(flats):
    return norms.block_squares(lambda: [flats])


@pytest.mark.parametrize("length", [1, 7, 1023, 1024, 1025, GRANULE, GRANULE + 5, 3 * GRANULE + 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_equals_the_sum_in_float64(length, dtype):
    flat = torch.randn(length, generator=torch.Generator().manual_seed(length), dtype=dtype)
    (blocks,) = block_squares([flat])
    assert blocks.dtype == np.float64
    assert len(blocks) == -(-length // GRANULE)
    expected = [float(part.abs().double().square().sum()) for part in flat.split(GRANULE)]
    np.testing.assert_allclose(blocks, expected, rtol=1e-14 if dtype == torch.float64 else 1e-6)


def test_a_block_does_not_depend_on_its_neighbours():
    flat = torch.randn(5 * GRANULE + 100, generator=torch.Generator().manual_seed(0))
    (together,) = block_squares([flat])
    apart = [blocks[0] for blocks in block_squares(list(flat.split(GRANULE)))]
    assert together.tolist() == apart
    for first in range(1, 5):
        (rest,) = block_squares([flat[first * GRANULE :]])
        assert rest.tolist() == together[first:].tolist()


def test_squares_too_large_for_float32_are_added_in_float64():
    (blocks,) = block_squares([torch.full((2048,), 1e30)])
    np.testing.assert_allclose(blocks, [2048e60], rtol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(value):
    flat = torch.ones(GRANULE)
    flat[77] = value
    (blocks,) = block_squares([flat])
    assert not np.isfinite(blocks).any()
