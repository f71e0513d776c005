"""Commands in a folder of their own, and what they leave behind."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import samestep

SOURCE = str(Path(samestep.__file__).parents[1])
MARK = "SAMESTEP_TEST_MARK"
OF_OTHERS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "XDG_RUNTIME_DIR")


@dataclass
class Ended:
    code: int
    out: str
    err: str


class Shell:
    """Starts commands in an empty folder, and sees that they leave nothing behind."""

    def __init__(self, folder):
        self.folder = folder
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self.mark = uuid.uuid4().hex
        clean = {name: value for name, value in os.environ.items() if name not in OF_OTHERS}
        self.environment = {**clean, "PYTHONPATH": SOURCE, "TMPDIR": str(self.temporary), MARK: self.mark}

    def start(self, *arguments):
        return subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A test run in the background of a shell ignores it, and its children would, too.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def python(self, *arguments):
        process = self.start(*arguments)
        out, err = process.communicate(timeout=120)
        return Ended(process.returncode, out, err)

    def samestep(self, *arguments):
        return self.python("-m", "samestep", *arguments)

    def processes(self):
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                try:
                    if f"{MARK}={self.mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                        found.append(int(entry.name))
                except OSError:
                    continue
        return found

    def is_gone_within(self, seconds):
        deadline = time.monotonic() + seconds
        while self.processes():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True


@contextlib.contextmanager
def shell_in(folder):
    """Give a shell in `folder`, and see at the end that nothing is left in the process table or in /dev/shm."""
    shared = set(os.listdir("/dev/shm"))
    started = Shell(folder)
    yield started
    left = started.processes()
    for pid in left:
        os.kill(pid, 9)
    assert not left, "processes were left behind"
    assert not {name for name in os.listdir("/dev/shm") if name not in shared and "samestep" in name}
