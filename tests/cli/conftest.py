from pathlib import Path

import pytest
from shell import shell_in

SCRIPT = Path(__file__).with_name("script.py")


@pytest.fixture
def shell(tmp_path):
    with shell_in(tmp_path) as started:
        yield started


@pytest.fixture(scope="session")
def script():
    return SCRIPT
