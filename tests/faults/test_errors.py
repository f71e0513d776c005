"""Errors of the script: those that may pass get a second try, and the rest is told once, with its place."""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import os, sys, samestep, torch
from torch import nn

def main(run):
    x = torch.randn(64, 4)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run.replicate(model, optimizer)
    for step in run.steps((x, x[:, :1].clone()), 8, epochs=5):
        for a, b in step:
            if step.number == 17:
                trouble(sys.argv[1])
            step.backward((model(a) - b).square().mean())
        step.update()
    return step.loss

def trouble(kind):
    if kind == "passes" and not os.path.exists("mark"):
        open("mark", "w").close()
        raise OSError("the disk hiccuped")
    if kind == "stays":
        raise OSError("the disk is gone")
    if kind == "wrong":
        raise ValueError("nonsense")
    if kind == "memory":
        torch.empty(1 << 50)

samestep.launch(main, replicas=4, workers=2)
"""


@pytest.fixture
def run(tmp_path, clean_environment):
    (tmp_path / "train.py").write_text(SCRIPT)

    def run(kind):
        summary = tmp_path / f"{kind}.json"
        command = [sys.executable, "-m", "samestep", "run", "train.py", "--summary", str(summary), "--", kind]
        environment = {**clean_environment, "TMPDIR": str(tmp_path)}
        ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        return ended, json.loads(summary.read_text()) if summary.exists() else None

    return run


def test_an_error_that_passes_changes_no_bit(run):
    (calm, expected), (ended, facts) = run("none"), run("passes")
    assert calm.returncode == ended.returncode == 0, ended.stderr
    assert "the disk hiccuped" in ended.stderr and "start again" in ended.stderr
    for key in ("weights_digest", "optimizer_digest", "samples_digest", "samples_exactly_once", "steps", "result"):
        assert facts[key] == expected[key], key


def test_an_error_that_stays_is_told_once_with_its_place(run):
    ended, _ = run("stays")
    assert ended.returncode == 1
    assert ended.stderr.count("start again") == 1
    assert ended.stderr.count("OSError: the disk is gone\n") == 1, "one traceback"
    assert "this happened in step 17, replica" in ended.stderr and "(samples" in ended.stderr
    assert "came again after a new start" in ended.stderr


def test_a_mistake_is_told_at_once(run):
    ended, _ = run("wrong")
    assert ended.returncode == 1
    assert "start again" not in ended.stderr and ended.stderr.count("ValueError: nonsense\n") == 1
    assert "this happened in step 17, replica" in ended.stderr


def test_memory_that_runs_out_is_named_with_sizes(run):
    ended, _ = run("memory")
    assert ended.returncode == 1
    assert "memory ran out: this worker holds" in ended.stderr and "are available" in ended.stderr
