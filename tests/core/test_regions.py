"""Regions of shared memory: what is given up goes back to the system, and is zero when it is taken again."""

from __future__ import annotations

import mmap
import os

import pytest

from samestep.core.regions import Regions


@pytest.fixture
def descriptor():
    number = os.memfd_create("samestep-test", os.MFD_CLOEXEC)
    yield number
    os.close(number)


def held_bytes(descriptor: int) -> int:
    return os.fstat(descriptor).st_blocks * 512


def test_what_is_given_up_goes_back(descriptor):
    regions, num_bytes = Regions(descriptor), 4 * mmap.PAGESIZE
    for name in ("a", "b"):
        regions.map(regions.take(name, num_bytes, makes=True))[:] = b"x" * num_bytes
    assert held_bytes(descriptor) == 2 * num_bytes
    assert regions.known("a", 2 * num_bytes) is None
    assert held_bytes(descriptor) == num_bytes
    assert regions.known("b", num_bytes)[:] == b"x" * num_bytes
    assert regions.map(regions.take("c", num_bytes, makes=True))[:] == bytes(num_bytes)
    assert regions.to_facts()[0] == 2 * num_bytes, "the room was not used again"
