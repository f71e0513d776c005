"""Training loops of every kind that users write, each a `main(run)`; the laws are held over them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from optimizers import Averaging, Coupled
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from zoo import (
    MODELS,
    NUM_CLASSES,
    OPTIMIZERS,
    Convolutional,
    Odd,
    Perceptron,
    Transformer,
    classes_loss,
    images,
    texts,
    trainable,
    vectors,
    words_loss,
)

from samestep.loop.run import Run

FEW = [(8, 1), (8, 3), (8, 8), (5, 1), (5, 2)]


@dataclass(frozen=True)
class Loop:
    """A script's main, and the (replicas, workers) it is played at."""

    main: Callable[[Run], Any]
    fleets: Sequence[tuple[int, int]] = tuple(FEW)


LOOPS: dict[str, Loop] = {}


def loop(main: Callable[[Run], Any]) -> Callable[[Run], Any]:
    """Add `main` to the loops."""
    LOOPS[main.__name__] = Loop(main)
    return main


def training(model_name: str, optimizer_name: str, epochs: int = 1, batch_size: int = 19) -> Callable[[Run], Any]:
    """Return the plain loop over a model and an optimizer of the zoo; batches are uneven."""

    def main(run: Run) -> Any:
        make, data, loss_of = MODELS[model_name]
        model = make()
        optimizer = OPTIMIZERS[optimizer_name](model.parameters())
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        run.replicate(model, optimizer, scheduler)
        told = []
        for step in run.steps(data(), batch_size=batch_size, epochs=epochs):
            for batch in step:
                loss = loss_of(model, batch)
                step.backward(loss)
                step.mean(loss=loss, drawn=torch.rand(()))
            step.update()
            scheduler.step()
            told.append([step.loss, step.means, run.digest()])
        return told, run.mean(lambda batch: loss_of(model, batch), data(), batch_size=7)

    return main


def updated(run: Run, step: Any, told: list) -> None:
    """Note what a step came to."""
    told.append([step.number, step.loss, step.means, run.digest()])


@loop
def clipped(run: Run) -> Any:
    model = Perceptron()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    run.replicate(model, optimizer)
    told = []
    for step in run.steps(vectors(), batch_size=19, steps=4):
        for batch in step:
            step.backward(classes_loss(model, batch) * 10)
        step.update(clip_norm=0.5 if step.number % 2 else math.inf)
        updated(run, step, told)
        told.append(step.grad_norm)
    return told


@loop
def clipped_whole_tensors(run: Run) -> Any:
    model = Transformer()
    optimizer = torch.optim.Adafactor(model.parameters(), lr=1e-2)
    run.replicate(model, optimizer)
    told = []
    for step in run.steps(texts(), batch_size=19, steps=3):
        for batch in step:
            step.backward(words_loss(model, batch) * 10)
        step.update(clip_norm=0.5)
        updated(run, step, told)
        told.append(step.grad_norm)
    return told


@loop
def transformed(run: Run) -> Any:
    model = Perceptron()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    run.replicate(model, optimizer)

    def noisy(name: str, gradient: torch.Tensor) -> torch.Tensor:
        return gradient / (1e-6 + gradient.norm()) + 0.01 * torch.randn_like(gradient)

    told = []
    for step in run.steps(vectors(), batch_size=19, steps=3):
        for batch in step:
            step.backward(classes_loss(model, batch))
        step.update(transform=noisy, clip_norm=0.7)
        updated(run, step, told)
    return told


@loop
def tokens_counted(run: Run) -> Any:
    model = Transformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    run.replicate(model, optimizer)
    told = []
    for step in run.steps(texts(), batch_size=19, steps=3):
        for words, targets in step:
            count = int((targets != -100).sum())
            loss = F.cross_entropy(model(words).flatten(0, 1), targets.flatten(), reduction="sum") / max(count, 1)
            step.backward(loss, count=count)
            step.mean(per_token=loss)
        step.update(clip_norm=1.0)
        updated(run, step, told)
    return told


@loop
def losses_as_vectors(run: Run) -> Any:
    model = Perceptron()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    run.replicate(model, optimizer)
    told = []
    for step in run.steps(vectors(), batch_size=19, steps=3):
        for batch in step:
            step.backward(classes_loss(model, batch, reduction="none"))
        step.update()
        updated(run, step, told)
    return told


@loop
def two_backward_calls(run: Run) -> Any:
    model = Perceptron()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    run.replicate(model, optimizer)
    told = []
    for step in run.steps(vectors(), batch_size=19, steps=3):
        for x, y in step:
            step.backward(F.cross_entropy(model(x), y))
            step.backward(0.1 * model(x).square().mean())
        step.update()
        updated(run, step, told)
    return told


def _autocast(run: Run, dtype: torch.dtype, scaler: torch.amp.GradScaler | None) -> Any:
    model = Perceptron()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    run.replicate(model, optimizer, *([scaler] if scaler is not None else []))
    told = []
    for step in run.steps(vectors(), batch_size=19, steps=5):
        for batch in step:
            with torch.autocast("cpu", dtype=dtype):
                loss = classes_loss(model, batch)
            if scaler is not None and step.number == 2:
                loss = loss * 1e30
            step.backward(scaler.scale(loss) if scaler is not None else loss)
        step.update(scaler=scaler, clip_norm=1.0)
        updated(run, step, told)
        told.append([step.skipped, scaler.get_scale() if scaler is not None else None])
    return told


@loop
def autocast_bfloat16(run: Run) -> Any:
    return _autocast(run, torch.bfloat16, None)


@loop
def autocast_float16_scaled(run: Run) -> Any:
    return _autocast(run, torch.float16, torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2))


@loop
def weights_in_bfloat16(run: Run) -> Any:
    model = Perceptron().bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    run.replicate(model, optimizer)
    told = []
    for step in run.steps(vectors(), batch_size=19, steps=3):
        for x, y in step:
            step.backward(F.cross_entropy(model(x.bfloat16()), y))
        step.update(clip_norm=1.0)
        updated(run, step, told)
    return told


@loop
def many_dtypes(run: Run) -> Any:
    model = Perceptron()
    model.first.double()
    model.last.bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, foreach=False)
    run.replicate(model, optimizer)
    told = []
    for step in run.steps(vectors(), batch_size=19, steps=3):
        for x, y in step:
            out = F.relu(model.inner(F.relu(model.first(x.double())).float()))
            step.backward(F.cross_entropy(model.last(out.bfloat16()).float(), y))
        step.update(clip_norm=1.0)
        updated(run, step, told)
    return told


@loop
def float64(run: Run) -> Any:
    model = Convolutional().double()
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3, momentum=0.9, centered=True)
    run.replicate(model, optimizer)
    told = []
    for step in run.steps(images(), batch_size=19, steps=3):
        for x, y in step:
            step.backward(F.cross_entropy(model(x.double()), y))
        step.update()
        updated(run, step, told)
    return told


@loop
def parameter_groups(run: Run) -> Any:
    model = Odd()
    body = list(model.body.parameters())
    rest = [p for p in trainable(model) if all(p is not q for q in body)]
    groups = [{"params": body, "lr": 1e-2, "weight_decay": 0.1}, {"params": rest, "betas": (0.8, 0.9)}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    warm = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda n: min(1, n / 3), lambda n: 0.9**n])
    run.replicate(model, optimizer, warm)
    told = []
    for step in run.steps(vectors(), batch_size=19, epochs=2):
        for batch in step:
            step.backward(classes_loss(model, batch))
        step.update()
        warm.step()
        updated(run, step, told)
    return told


@loop
def rate_cycles_momentum(run: Run) -> Any:
    model = Perceptron()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=8)
    run.replicate(model, optimizer, cycle)
    told = []
    for step in run.steps(vectors(), batch_size=19, epochs=2):
        for batch in step:
            step.backward(classes_loss(model, batch))
        step.update()
        cycle.step()
        updated(run, step, told)
        told.append([optimizer.param_groups[0]["momentum"], optimizer.param_groups[0]["lr"]])
    return told


@loop
def gradient_penalty(run: Run) -> Any:
    model = Perceptron()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    run.replicate(model, optimizer)
    told = []
    for step in run.steps(vectors(), batch_size=19, steps=3):
        for x, y in step:
            x.requires_grad_()
            loss = F.cross_entropy(model(x), y)
            (slope,) = torch.autograd.grad(loss, x, create_graph=True)
            step.backward(loss + 0.1 * slope.square().sum(1).mean())
        step.update()
        updated(run, step, told)
    return told


def _checkpointed(run: Run, reentrant: bool) -> Any:
    model = Convolutional()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    run.replicate(model, optimizer)
    told = []
    for step in run.steps(images(), batch_size=19, steps=3):
        for x, y in step:
            hidden = checkpoint(lambda z: F.relu(model.second(z)), model.first(x), use_reentrant=reentrant)
            hidden = checkpoint(lambda z: F.relu(model.second(z)), hidden, use_reentrant=reentrant)
            out = checkpoint(lambda z: model.dropout(model.inner(z)), hidden.flatten(1), use_reentrant=reentrant)
            step.backward(F.cross_entropy(model.last(out), y))
        step.update()
        updated(run, step, told)
    return told


@loop
def checkpointed_reentrant(run: Run) -> Any:
    return _checkpointed(run, True)


@loop
def checkpointed_plain(run: Run) -> Any:
    return _checkpointed(run, False)


@loop
def several_modules(run: Run) -> Any:
    encoder, head = nn.Sequential(nn.Linear(20, 300), nn.BatchNorm1d(300), nn.ReLU()), nn.Linear(300, NUM_CLASSES)
    teacher = nn.Linear(20, NUM_CLASSES)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=3e-3)
    run.replicate(encoder, head, teacher, optimizer)
    told = []
    for step in run.steps(vectors(), batch_size=21, steps=3):
        for x, y in step:
            out = head(encoder(x) if len(x) > 1 else encoder.eval()(x))
            encoder.train()
            step.backward(F.cross_entropy(out, y) + F.mse_loss(out, teacher(x).detach()))
        step.update()
        updated(run, step, told)
    return told


@loop
def adversarial(run: Run) -> Any:
    maker = nn.Sequential(nn.Linear(6, 250), nn.ReLU(), nn.Linear(250, 20))
    judge = nn.Sequential(nn.Linear(20, 250), nn.LeakyReLU(), nn.Dropout(0.2), nn.Linear(250, 1))
    ours = torch.optim.Adam(maker.parameters(), lr=2e-3)
    theirs = torch.optim.RMSprop(judge.parameters(), lr=1e-3)
    run.replicate(maker, judge, ours, theirs)
    told = []
    for step in run.steps(vectors(), batch_size=19, steps=3):
        for x, _ in step:
            fake = maker(torch.randn(len(x), 6)).detach()
            step.backward(F.softplus(-judge(x)).mean() + F.softplus(judge(fake)).mean())
        step.update(theirs)
        updated(run, step, told)
        for x, _ in step:
            step.backward(F.softplus(-judge(maker(torch.randn(len(x), 6)))).mean())
        step.update(ours, clip_norm=1.0)
        updated(run, step, told)
    return told


@loop
def channels_last(run: Run) -> Any:
    model = Convolutional().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    run.replicate(model, optimizer)
    told = []
    for step in run.steps(images(), batch_size=19, steps=3):
        for x, y in step:
            step.backward(classes_loss(model, (x.contiguous(memory_format=torch.channels_last), y)))
        step.update(clip_norm=1.0)
        updated(run, step, told)
    return told


def _unknown_optimizer(run: Run, made: type) -> Any:
    model = Odd()
    optimizer = made(trainable(model), lr=0.05)
    run.replicate(model, optimizer)
    told = []
    for step in run.steps(vectors(), batch_size=19, steps=4):
        for batch in step:
            step.backward(classes_loss(model, batch))
        step.update()
        updated(run, step, told)
    return told, [group["lr"] for group in optimizer.param_groups]


@loop
def unknown_coupled_optimizer(run: Run) -> Any:
    return _unknown_optimizer(run, Coupled)


@loop
def unknown_separable_optimizer(run: Run) -> Any:
    return _unknown_optimizer(run, Averaging)


@loop
def spectral_norm(run: Run) -> Any:
    model = Perceptron()
    nn.utils.parametrizations.spectral_norm(model.inner)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    run.replicate(model, optimizer, buffers={"*._u": "first", "*._v": "first"})
    told = []
    for step in run.steps(vectors(), batch_size=19, steps=3):
        for batch in step:
            step.backward(classes_loss(model, batch))
        step.update()
        updated(run, step, told)
    return told


class Counters(nn.Module):
    """Buffers written in place, replaced by new tensors, and of several dtypes."""

    def __init__(self):
        super().__init__()
        self.body = Perceptron()
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("center", torch.zeros(20))
        self.register_buffer("spread", torch.ones(20, dtype=torch.float64))
        self.register_buffer("noise", torch.zeros(3), persistent=False)
        self.register_buffer("absent", None)

    def forward(self, x):
        if self.training:
            self.seen += len(x)
            self.center = 0.9 * self.center + 0.1 * x.detach().mean(0)
            self.spread.mul_(0.9).add_(x.detach().double().square().mean(0), alpha=0.1)
            self.noise = torch.randn(3)
        return self.body((x - self.center) / self.spread.sqrt().float())


def _counters(run: Run, rule: Any) -> Any:
    model = Counters()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    run.replicate(model, optimizer, buffers=rule)
    told = []
    for step in run.steps(vectors(), batch_size=19, steps=3):
        for batch in step:
            step.backward(classes_loss(model, batch))
        step.update()
        updated(run, step, told)
    return told, [int(model.seen), model.center.clone(), model.noise.clone()]


@loop
def buffers_meant(run: Run) -> Any:
    return _counters(run, "mean")


@loop
def buffers_of_first(run: Run) -> Any:
    return _counters(run, {"center": "first", "*": "mean"})


@loop
def more_replicas_than_samples(run: Run) -> Any:
    model = Convolutional()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    run.replicate(model, optimizer)
    told = []
    for step in run.steps(images(), batch_size=3, steps=4):
        for batch in step:
            step.backward(classes_loss(model, batch))
        step.update(clip_norm=1.0)
        updated(run, step, told)
    return told


@loop
def empty_and_scattered_parameters(run: Run) -> Any:
    """A parameter that is every second column of a tensor gets memory of its own."""
    model = Perceptron()
    model.last.weight = nn.Parameter(torch.randn(NUM_CLASSES, 400)[:, ::2].mul_(0.1))
    model.none = nn.Parameter(torch.zeros(0, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    run.replicate(model, optimizer)
    told = []
    for step in run.steps(vectors(), batch_size=19, steps=2):
        for batch in step:
            step.backward(classes_loss(model, batch) + model.none.sum())
        step.update(clip_norm=1.0)
        updated(run, step, told)
    return told


@loop
def rate_is_a_tensor(run: Run) -> Any:
    model = Perceptron()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(3e-3), foreach=False)
    halve = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    run.replicate(model, optimizer, halve)
    told = []
    for step in run.steps(vectors(), batch_size=19, steps=3):
        for batch in step:
            step.backward(classes_loss(model, batch))
        step.update()
        halve.step()
        updated(run, step, told)
    return told


@loop
def very_large_tensor(run: Run) -> Any:
    """One tensor of 520 x 520 elements, longer than a piece."""
    model = nn.Sequential(nn.Linear(20, 520), nn.ReLU(), nn.Linear(520, 520), nn.ReLU(), nn.Linear(520, NUM_CLASSES))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    run.replicate(model, optimizer)
    told = []
    for step in run.steps(vectors(), batch_size=19, steps=2):
        for batch in step:
            step.backward(classes_loss(model, batch))
        step.update(clip_norm=1.0)
        updated(run, step, told)
    return told


@loop
def epochs_one_by_one(run: Run) -> Any:
    model = Convolutional()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    run.replicate(model, optimizer)
    told: list = []
    for epoch in range(3):
        for step in run.steps(images(), batch_size=lambda n: 11 + 4 * n, epochs=1):
            for batch in step:
                step.backward(classes_loss(model, batch))
            step.update()
            updated(run, step, told)
        drawn = run.once(lambda: float(torch.rand(())))
        told.append([epoch, run.mean(lambda b: classes_loss(model, b), images(), 9), drawn, float(torch.rand(()))])
    return told


@loop
def frozen_and_thawed(run: Run) -> Any:
    """A part begins to train after some steps."""
    model = Odd()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    run.replicate(model, optimizer)
    told = []
    for step in run.steps(vectors(), batch_size=19, steps=4):
        if step.number == 2:
            model.frozen.requires_grad_(True)
            model.body.first.requires_grad_(False)
        for batch in step:
            step.backward(classes_loss(model, batch))
        step.update()
        updated(run, step, told)
    return told


@loop
def edited(run: Run) -> Any:
    model = Convolutional()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    run.replicate(model, optimizer)
    told = []
    for step in run.steps(images(), batch_size=19, steps=3):
        for batch in step:
            step.backward(classes_loss(model, batch))
        step.update()
        with run.edit():
            model.inner.weight.add_(0.5)
            model.last.weight.data.clamp_(-0.05, 0.05)
            model.first.weight.copy_(torch.randn_like(model.first.weight))
            model.norm.bias.data = torch.ones(4)
            nn.utils.vector_to_parameters(torch.ones(model.last.bias.numel()), [model.last.bias])
        updated(run, step, told)
    return told
