"""A run with a slow worker: what it says, and how to keep replicas where they are."""

from __future__ import annotations

import json

SCRIPT = """
import time
import samestep, torch

def main(run):
    model = torch.nn.Linear(4, 3)
    run.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1))
    moves = run._session.crew.balance.moves
    for step in run.steps((torch.randn(64, 4),), batch_size=16, steps={steps}):
        for (x,) in step:
            time.sleep(0.02 if run.worker.rank == 1 else 0)
            step.backward(model(x).square().mean())
        step.update()
        if moves and moves[0].seconds_since:
            break

samestep.launch(main, replicas=4, workers=2{settings})
"""


def played(shell, steps, settings="", *options):
    (shell.folder / "train.py").write_text(SCRIPT.format(steps=steps, settings=settings))
    ended = shell.samestep("run", "--summary", "summary.json", *options, "train.py")
    assert ended.code == 0, ended.err
    return json.loads((shell.folder / "summary.json").read_text()), ended.err


def test_moves_are_told_when_they_happen_and_in_the_summary(shell):
    facts, said = played(shell, 2000)
    words = facts["moves"][0]["words"]
    assert facts["moves"][0]["replicas_after"] == [3, 1]
    assert "1 of 2 from worker 1" in words and "of the time since" in words
    assert f"samestep: {words[: words.index(';')]}." in said
    assert "balance" in said[said.index("fleet") :]


def test_replicas_stay_if_they_shall(shell):
    facts, said = played(shell, 40, ", balance=True", "--no-balance")
    assert facts["moves"] == []
    assert "Replicas moved" not in said
