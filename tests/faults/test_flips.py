"""The short form of the campaign of flipped bits; each part of the mechanism that is left out makes it fail."""

from __future__ import annotations

import subprocess
import sys

import pytest
from test_campaign import lines_of


@pytest.fixture
def play(tmp_path, clean_environment):
    environment = {**clean_environment, "TMPDIR": str(tmp_path)}

    def play(*arguments):
        lines, ended = lines_of("flip_campaign.py", *arguments, environment=environment)
        assert lines, ended.stderr
        *cases, total = lines
        assert total["cases"] == len(cases), ended.stderr
        return cases, total

    return play


def assert_all_found(cases, total):
    assert not [case for case in cases if case["wrong"]]
    assert total["flips"] >= 0.9 * total["cases"], "the bits were not flipped"
    assert {case["where"] for case in cases if case["struck"]} == {"memory", "gradient", "copied", "kept"}


def test_flipped_bits_are_found_named_and_mended(play):
    assert_all_found(*play("--cases", 20))


@pytest.mark.parametrize(
    ("without", "where", "seed"), [("compare", "memory", 1), ("withdraw", "copied", 5), ("fold", "kept", 19)]
)
def test_what_is_left_out_is_missed(play, without, where, seed):
    _, total = play("--cases", 2, "--seed", seed, "--without", without, "--where", where)
    assert total["flips"] and total["wrong"] == total["flips"]


SCRIPT = """
import pathlib, samestep, time, torch

def main(run):
    x = torch.randn(64, 4)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run.replicate(model, optimizer)
    try:
        for step in run.steps((x, x[:, :1].clone()), 8, epochs=5):
            for a, b in step:
                step.backward((model(a) - b).square().mean())
            step.update()
            if run.worker.is_first and step.number >= 5 and run._session.integrity.is_watching:
                model.weight.detach().view(torch.int32).numpy()[0, 1] ^= 4
    except samestep.IntegrityError:
        # The other worker, which ends the run, waits for the first.
        swallowed = pathlib.Path("swallowed")
        if run.worker.is_first:
            swallowed.touch()
        while not swallowed.exists():
            time.sleep(0.01)
    run.save("saved")

samestep.launch(main, replicas=4, workers=2)
"""


def test_a_bit_that_always_flips_ends_the_run_and_nothing_is_saved(tmp_path, clean_environment):
    (tmp_path / "train.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "samestep", "run", "train.py"]
    environment = {**clean_environment, "TMPDIR": str(tmp_path)}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1, ended.stderr
    assert "samestep: A bit of the parameter 'weight' flipped in memory" in ended.stderr
    assert "start again" in ended.stderr and ("came again" in ended.stderr or "came no further" in ended.stderr)
    assert (tmp_path / "swallowed").exists()
    assert not (tmp_path / "saved").exists()
