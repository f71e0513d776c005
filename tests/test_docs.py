"""Every Python block of the documents runs: those with a `main` on one worker and on two, to the same digest."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from samestep.core.fakes import run_threads
from samestep.core.group import Group, Solo
from samestep.core.randomness import seed_start
from samestep.loop.recipe import Keeping, Recipe
from samestep.loop.run import Run
from samestep.loop.session import Session

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

PRELUDE = """
import math, torch, samestep
from torch import nn
from torch.nn import functional as F

_g = torch.Generator().manual_seed(0)
_x = torch.randn(96, 6, generator=_g)
_y = (_x.sum(1) > 0).long()
train_set, test_set = (_x[:64], _y[:64]), (_x[64:], _y[64:])

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))

class Generator(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 6))

class Critic(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))

class Tagger(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Embedding(10, 8), nn.Linear(8, 3))

class Policy(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))

def accuracy(model, batch):
    x, y = batch
    return (model(x).argmax(1) == y).float()

sentences = [torch.arange(3 + i % 5) % 10 for i in range(48)]

def pad(batch):
    tokens = nn.utils.rnn.pad_sequence(batch, batch_first=True)
    labels = nn.utils.rnn.pad_sequence([t % 3 for t in batch], batch_first=True, padding_value=-100)
    return tokens, labels

def play(policy, seeds):
    rows = []
    for seed in seeds.tolist():
        g = torch.Generator().manual_seed(seed)
        state = torch.randn(5, 2, generator=g)
        action = policy(state).argmax(-1)
        reward = (action == (state[:, 0] > 0)).float()
        rows.append(torch.cat([state, action[:, None], reward.flip(0).cumsum(0).flip(0)[:, None]], 1))
    return torch.stack(rows)
"""


def blocks() -> list[tuple[Path, int, str]]:
    """Return (file, line, code) of every Python block."""
    found = []
    for path in DOCUMENTS:
        text = path.read_text() if path.exists() else ""
        for match in re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S):
            found.append((path, text[: match.start()].count("\n") + 2, match[1]))
    return found


LOOPS = [pytest.param(*block, id=f"{block[0].name}:{block[1]}") for block in blocks() if "def main(run" in block[2]]
PAGES = sorted({block[0] for block in blocks() if "def main(run" not in block[2]})


def execute(path: Path, line: int, code: str, names: dict) -> None:
    """Run a block so that tracebacks point into the document."""
    exec(compile("\n" * (line - 1) + code, str(path), "exec"), names)


def facts_of(main, group: Group) -> dict:
    """Play `main` as one worker of `group` and return the facts of its run."""
    seed_start(0)
    session = Session(Recipe(), Keeping(), group)
    return session.finish(main(Run(session)))


@pytest.mark.parametrize(("path", "line", "code"), LOOPS)
def test_loop_runs(path: Path, line: int, code: str):
    torch.set_num_threads(1)
    names: dict = {"__name__": "document"}
    exec(PRELUDE, names)
    execute(path, line, code, names)
    alone = facts_of(names["main"], Solo())
    together = run_threads(lambda group: facts_of(names["main"], group), 2)[0]
    assert alone["samples_exactly_once"]
    assert alone["weights_digest"] == together["weights_digest"]
    assert alone["optimizer_digest"] == together["optimizer_digest"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "document"}
    for path, line, code in blocks():
        if path == page and "def main(run" not in code:
            execute(path, line, code, names)


def test_documents_have_blocks():
    assert len(LOOPS) > 14
