"""`samestep verify` keeps the weights read-only between updates: scripts that write to them, and others."""

import pytest

FORBIDDEN = {
    "early view": "view[0, 3] = 0.0",
    "frozen": "model[0].weight.data[0, 1] = 2.0",
    "one worker": "(run.worker.rank == 1 and model[1].weight.data[0, 5].fill_(1.0))",
    "in torch": "nn.init.ones_(model[1].bias.data[1:2])",
}

SCRIPT = """
import ctypes, samestep, torch
from torch import nn

def main(run):
    # Large, so that the guard's samples do not meet what is written.
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 300))
    model[0].requires_grad_(False)
    run.replicate(model, torch.optim.SGD(model[1].parameters(), lr=0.1))
    view = model[1].weight.detach().numpy()
    for step in run.steps((torch.randn(64, 64),), batch_size=16, steps=3):
        for (x,) in step:
            step.backward(model(x).square().mean())
        step.update()
        if run.worker.size > 1 and step.number == 1:
            {act}  # here

samestep.launch(main, replicas=4)
"""


def verify(shell, text, *options, workers="2,1"):
    (shell.folder / "train.py").write_text(text)
    return shell.samestep("verify", "train.py", "--workers", workers, "--steps", 3, *options)


def number_of(text, words):
    return next(number for number, line in enumerate(text.splitlines(), 1) if words in line)


LONG = "frozen", "in torch"


@pytest.mark.parametrize(
    "act",
    [pytest.param(act, id=name, marks=[pytest.mark.long] * (name in LONG)) for name, act in FORBIDDEN.items()],
)
def test_a_write_is_named_with_its_line(shell, act):
    text = SCRIPT.format(act=act)
    ended = verify(shell, text)
    line = number_of(text, "# here")
    assert ended.code == 1, ended.out
    assert f"was killed by SIGSEGV: it wrote to the weights outside of update at train.py:{line};" in ended.err
    assert "with run.edit():" in ended.err
    assert f'train.py", line {line}, in ' in ended.err
    assert "torch/" not in ended.err.partition("samestep: what the other")[0], "only the user's frames are shown"
    assert ("Worker 1 (pid" in ended.err) or "rank" not in act


def test_with_threads_no_handler_can_look_so_it_is_only_probable(shell):
    text = SCRIPT.format(act=FORBIDDEN["frozen"])
    ended = verify(shell, text, "--threads", 2)
    assert f"it probably wrote to the weights outside of update at train.py:{number_of(text, '# here')};" in ended.err
    assert "If nothing is written there, native code crashed." in ended.err


def test_a_crash_elsewhere_is_not_blamed_on_a_write(shell):
    text = SCRIPT.format(act="ctypes.memset(8, 0, 1)")
    ended = verify(shell, text)
    assert ended.code == 1
    assert f"was killed by SIGSEGV: native code crashed at train.py:{number_of(text, '# here')}:" in ended.err
    assert "wrote" not in ended.err
    sent = verify(shell, SCRIPT.format(act="__import__('os').kill(__import__('os').getpid(), 11)"))
    assert "native code crashed at train.py" in sent.err
    assert "wrote" not in sent.err


def test_a_run_that_is_not_verified_is_not_protected(shell):
    # The same value again: the watch over flipped bits, which looks now and then, finds no change either.
    (shell.folder / "train.py").write_text(SCRIPT.format(act="view[0, 3] = view[0, 3]"))
    ended = shell.samestep("run", "train.py", "--workers", 2)
    assert ended.code == 0, ended.err


ORDINARY = """
import copy, samestep, torch
from torch import nn

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.frozen, self.norm = nn.Linear(8, 8, bias=False), nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.frozen.requires_grad_(False)
        self.out = nn.Linear(8, 8)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(self.norm(self.frozen(self.embed(x)))).sum(1)

class Whole(torch.optim.SGD):
    def step(self):
        self.count = getattr(self, "count", 0) + 1
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                if p.grad is not None:
                    p.add_(p.grad, alpha=-0.01 / self.count)

def main(run):
    model = Tied()
    ema = copy.deepcopy(model)
    optimizer = {optimizer}
    run.replicate(model, optimizer, ema)
    for step in run.steps((torch.randn(64, 8),), batch_size=16, steps=3):
        for (x,) in step:
            step.backward(model(x).square().mean())
        step.update(clip_norm=1.0)
        with torch.no_grad():
            for mine, theirs in zip(ema.parameters(), model.parameters()):
                mine.lerp_(theirs, 0.1)
        with run.edit():
            model.frozen.weight.mul_(0.9)
            model.out.weight.detach().numpy()[0, 0] = 0.5
        if step.number == 0:
            run.save("saved")
        if step.number == 1:
            run.load("saved")
        model.out.weight.detach().numpy().copy()
        run.mean(lambda batch: model(batch[0]), (torch.randn(8, 8),), batch_size=4)

samestep.launch(main, replicas=4)
"""

PAIR = """
import samestep, torch
from torch import nn

def main(run):
    maker, critic = nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (maker, critic)]
    run.replicate(maker, critic, *optimizers)
    for step in run.steps((torch.randn(64, 8),), batch_size=16, steps=3):
        for (x,) in step:
            made = maker(x[:, :4]).detach()
            step.backward((critic(made) - critic(x)).mean())
        step.update(optimizers[1])
        for (x,) in step:
            step.backward(-critic(maker(x[:, :4])).mean())
        step.update(optimizers[0], transform=lambda name, gradient: gradient * 0.5)

samestep.launch(main, replicas=4)
"""

ELEMENT = "torch.optim.AdamW(model.parameters(), lr=0.01)"
OPTIMIZERS = {
    "tensor": "torch.optim.Adafactor(model.parameters(), lr=0.01)",
    "whole": "Whole(model.parameters(), lr=0.01)",
}


@pytest.mark.parametrize(
    "text",
    [
        *(pytest.param(ORDINARY.format(optimizer=o), id=k, marks=pytest.mark.long) for k, o in OPTIMIZERS.items()),
        pytest.param(ORDINARY.format(optimizer=ELEMENT), id="element"),
        pytest.param(PAIR, id="pair"),
    ],
)
def test_scripts_that_keep_the_rules_pass(shell, text):
    ended = verify(shell, text, workers="1,2")
    assert ended.code == 0, ended.err + ended.out
    assert "The same bits at every step" in ended.out
