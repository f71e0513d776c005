"""Two sites as users start them, while workers and the meeting place are killed: the bits of an undisturbed run."""

from __future__ import annotations

import json
import os
import queue
import re
import subprocess
import sys
import threading
from pathlib import Path

from meeting import meeting, undisturbed

SCRIPT = Path(__file__).with_name("site_script.py")
DEADLINE = 240.0


class Place:
    """A `samestep meet` process, started again at the same port if it is killed."""

    def __init__(self, folder: Path, secret: Path):
        self._arguments = ["--secret", str(secret), "--keep", str(folder)]
        self.lines: queue.Queue[str] = queue.Queue()
        self.told: list[str] = []
        self.at = "127.0.0.1:0"
        self.start()
        self.at = re.findall(r"127\.0\.0\.1:\d+", self.await_line("Sites meet"))[0]

    def start(self) -> None:
        command = [sys.executable, "-m", "samestep", "meet", self.at, *self._arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        threading.Thread(target=self._read, args=(self.process.stdout,)).start()

    def _read(self, stream) -> None:
        with stream:
            for line in stream:
                self.lines.put(line.strip())

    def await_line(self, begin: str) -> str:
        while True:
            self.told.append(self.lines.get(timeout=DEADLINE))
            if self.told[-1].startswith(begin):
                return self.told[-1]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def test_deaths_of_workers_and_of_the_place_change_nothing(fleet, tmp_path):
    with meeting() as place:
        expected = fleet.play(undisturbed, "bare", 2, at=place.at)
    secret, marks = tmp_path / "secret", tmp_path / "marks"
    secret.write_text("only for these two sites\n")
    marks.mkdir()
    flags = {
        "a": [f"{marks}:land:2:0", f"{marks}:visit:2:1"],
        "b": [f"{marks}:after give:1:0", f"{marks}:encode:2:0"],
    }
    place, sites = Place(tmp_path / "place", secret), {}
    try:
        for name, given in flags.items():
            command = [sys.executable, "-m", "samestep", "run", str(SCRIPT), "--workers", "2"]
            command += ["--summary", str(tmp_path / f"{name}.json"), "--", place.at, name, str(secret), *given]
            sites[name] = subprocess.Popen(command, env=dict(os.environ), stderr=subprocess.PIPE, text=True)
        place.await_line("Round 3")
        place.kill()
        place.start()
        said = {name: site.communicate(timeout=DEADLINE)[1] for name, site in sites.items()}
    finally:
        for process in (place.process, *sites.values()):
            process.kill()
            process.wait()
    for name, site in sites.items():
        assert site.returncode == 0, said[name]
    assert sorted(mark.name for mark in marks.iterdir()) == [
        *("a land 2 0", "a visit 2 1", "b after give 1 0", "b encode 2 0")
    ]
    facts = [json.loads((tmp_path / f"{name}.json").read_text()) for name in sites]
    assert [one["result"] for one in facts] == expected
    assert [one["site"]["counted"] for one in facts] == [6, 6]
    assert [one["site"]["missed"] for one in facts] == [0, 0]
    assert all(one["samples_exactly_once"] for one in facts)
