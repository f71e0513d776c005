"""The data room's tests leave nothing behind."""

import os

import psutil
import pytest


@pytest.fixture(autouse=True)
def leaves_nothing_behind():
    """No processes and no descriptors stay."""
    before, descriptors = psutil.Process().children(), len(os.listdir("/proc/self/fd"))
    yield
    assert psutil.Process().children() == before
    assert len(os.listdir("/proc/self/fd")) == descriptors
