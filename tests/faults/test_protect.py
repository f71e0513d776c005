"""Without protection a dead worker ends the run, at once and with a clear word; with it, its memory is told."""

import json
import re
import subprocess
import sys

import pytest

SCRIPT = """
import os, signal, sys, samestep, torch

def main(run):
    x = torch.randn(64, 4)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run.replicate(model, optimizer)
    for step in run.steps((x, x[:, :1].clone()), 8, epochs=5):
        for a, b in step:
            step.backward((model(a) - b).square().mean())
        step.update()
        if step.number == 17 and run.worker.rank == 1 and not os.path.exists("mark"):
            open("mark", "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        if step.number == 30 and len(sys.argv) > 2:
            raise ValueError("a mistake")
    return step.loss

samestep.launch(main, replicas=4, workers=2, **eval(sys.argv[1]))
"""


@pytest.fixture
def run(tmp_path, clean_environment):
    (tmp_path / "train.py").write_text(SCRIPT)

    def run(*options, arguments=("{}",)):
        summary = tmp_path / "summary.json"
        command = [sys.executable, "-m", "samestep", "run", "train.py", "--summary", str(summary), *options]
        ended = subprocess.run(
            [*command, "--", *arguments],
            cwd=tmp_path,
            env={**clean_environment, "TMPDIR": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        return ended, json.loads(summary.read_text()) if summary.exists() else None

    return run


@pytest.mark.parametrize(
    ("options", "arguments"), [(("--no-protect",), "{}"), ((), "{'protect': False}")], ids=["command", "script"]
)
def test_without_protection_a_death_ends_the_run(run, options, arguments):
    ended, _ = run(*options, arguments=[arguments])
    assert ended.returncode == 1
    assert "was killed by SIGKILL" in ended.stderr and "start again" not in ended.stderr


def test_with_it_the_run_goes_on_and_tells_what_it_takes(run):
    ended, facts = run()
    assert ended.returncode == 0, ended.stderr
    assert re.search("start again|replicas moved", ended.stderr) and "survive" in ended.stderr
    assert facts["snapshot_bytes"] > 0


def test_an_error_after_a_death_is_not_said_to_have_come_twice(run):
    ended, _ = run(arguments=["{}", "mistake"])
    assert ended.returncode == 1
    assert re.search("start again|replicas moved", ended.stderr) and "ValueError: a mistake" in ended.stderr
    assert "came again" not in ended.stderr
