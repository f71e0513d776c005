import os
from pathlib import Path

import pytest
from shell import Shell

SCRIPT = Path(__file__).with_name("script.py")


@pytest.fixture
def shell(tmp_path):
    shared = set(os.listdir("/dev/shm"))
    started = Shell(tmp_path)
    yield started
    left = started.processes()
    for pid in left:
        os.kill(pid, 9)
    assert not left, "processes were left behind"
    assert not {name for name in os.listdir("/dev/shm") if name not in shared and "samestep" in name}


@pytest.fixture(scope="session")
def script():
    return SCRIPT
