"""What all laws stand on: one thread, so that bits are those of the recipe, and this folder's own modules."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Intra-op threads are part of a recipe; the laws' recipes say 1."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
