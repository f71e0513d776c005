import os
from pathlib import Path

import pytest

import samestep


@pytest.fixture
def clean_environment():
    """The environment without what a launcher sets, and with this source first."""
    left_out = ("RANK", "WORLD_SIZE", "MASTER_ADDR")
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    return {**kept, "PYTHONPATH": str(Path(samestep.__file__).parents[1])}
