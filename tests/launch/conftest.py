import json
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

import samestep

SOURCE = str(Path(samestep.__file__).parents[1])
DRIVER = Path(__file__).with_name("driver.py")
MARK = "SAMESTEP_TEST_MARK"


def pids_marked(mark):
    """Processes, zombies aside, that were started with this mark in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


class Driver:
    """Runs `driver.py`; sees that nothing stays behind."""

    def __init__(self, folder):
        self.folder = folder
        self.mark = uuid.uuid4().hex
        self.environment = {**os.environ, "PYTHONPATH": SOURCE, "TMPDIR": str(folder), MARK: self.mark}

    def start(self, body, num_workers):
        return subprocess.Popen(
            [sys.executable, str(DRIVER), body, str(num_workers)],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __call__(self, body, num_workers=2):
        process = self.start(body, num_workers)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output
        *printed, last = output.splitlines()
        return {**json.loads(last), "printed": "\n".join(printed)}

    def files(self):
        return sorted(path.relative_to(self.folder) for path in self.folder.rglob("*") if path.is_file())

    def is_gone_within(self, seconds):
        deadline = time.monotonic() + seconds
        while pids_marked(self.mark):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True


@pytest.fixture
def drive(tmp_path):
    driver = Driver(tmp_path)
    shared = set(os.listdir("/dev/shm"))
    yield driver
    left = pids_marked(driver.mark)
    for pid in left:
        os.kill(pid, 9)
    assert not left, "processes were left behind"
    assert not {name for name in os.listdir("/dev/shm") if name not in shared and "samestep" in name}
