"""Sites as processes of their own, and a meeting place in this one."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "laws"))
import site_script
from playing import plain, play_one

import samestep
from samestep.core.group import Solo
from samestep.loop.recipe import Keeping
from samestep.sites.place import Place
from samestep.sites.server import Server

STEPS = 12
ROWS = 8


class Meeting:
    """A meeting place that listens.

    Attributes:
        place: the place.
        told: what it has told.
        at: its address.
    """

    def __init__(
        self,
        folder: str | None = None,
        port: int = 0,
        secret: bytes = b"",
        when: dict[str, Callable[[], Any]] | None = None,
    ):
        """Listen; `when` names what is done, in a thread, when a line that begins so is told."""
        self.told: list[str] = []
        self._when = dict(when or {})
        self._helpers: list[threading.Thread] = []
        self.place = Place(folder, self._tell)
        self._server = Server("127.0.0.1", port, self.place, secret)
        self.port = self._server.server_address[1]
        self.at = f"127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def _tell(self, text: str) -> None:
        self.told.append(text)
        for begin in [begin for begin in self._when if text.startswith(begin)]:
            self._helpers.append(threading.Thread(target=self._when.pop(begin)))
            self._helpers[-1].start()

    def await_helpers(self) -> None:
        """Return when what was to be done is done."""
        for helper in self._helpers:
            helper.join()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextmanager
def meeting(**settings: Any) -> Iterator[Meeting]:
    """Let sites meet inside the `with` block."""
    opened = Meeting(**settings)
    try:
        yield opened
    finally:
        opened.close()
        opened.await_helpers()


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs (STEPS * ROWS, 3) and targets, of one replica after the other in each batch."""
    x = torch.randn(STEPS * ROWS, 3, generator=torch.Generator().manual_seed(3))
    return x, x.sum(1, keepdim=True) + torch.arange(len(x))[:, None] % ROWS


def half(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what replica `number` of two reads of `rows`, batch by batch."""
    x, y = rows()
    each = ROWS // 2
    keep = (torch.arange(len(x)) % ROWS) // each == number
    return x[keep], y[keep]


def train(
    way: Any, data: Any, batch_size: int, steps: int = STEPS, normed: bool = False, after: Callable | None = None
) -> Callable:
    """Return a `main` that trains a small network, and returns its weights and losses."""

    def main(run: samestep.Run) -> Any:
        torch.manual_seed(5)
        middle = [nn.BatchNorm1d(8), nn.Dropout(0.2)] if normed else []
        model = nn.Sequential(nn.Linear(3, 8), *middle, nn.Tanh(), nn.Linear(8, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        run.replicate(model, optimizer, agree=way)
        losses = []
        for step in run.steps(data, batch_size=batch_size, steps=steps, shuffle=False):
            for a, b in step:
                step.backward((model(a) - b).square().mean())
            step.update()
            losses.append(step.loss)
            if after is not None:
                after(run, step)
        return [p.detach().clone() for p in model.parameters()] + [b.clone() for b in model.buffers()], losses

    return main


def visit(group: Any, settings: dict[str, Any], tricks: dict[str, Any] | None = None) -> Any:
    """Program of a process: be site number `group.worker.rank`; return weights and losses as text, and its standing.

    Args:
        group: tells which site this is.
        settings: of `Sites`, the name left out.
        tricks: of some sites, by number: `dies` after so many steps; `waits` for files after so many each, `makes` a
            file after so many; `steps`, `checkpoint` (after each step), `resume`.
    """
    number = group.worker.rank
    mine = (tricks or {}).get(str(number), {})
    settings = dict(settings)
    for name in ("outer", "codec", "back"):
        if name in settings:
            kind, *arguments = settings[name]
            settings[name] = getattr(samestep if name == "outer" else samestep.codecs, kind)(*arguments)
    way = samestep.Sites(name=f"site {number}", **settings)
    standings = []

    def after(run: Any, step: Any) -> None:
        standings.append(run._session.agreed.facts()["site"])
        made, waits, makes = step.number + 1, mine.get("waits", []), mine.get("makes", [0, ""])
        if made == mine.get("dies"):
            os._exit(9)
        if made == makes[0]:
            Path(makes[1]).touch()
        while any(made == at and not Path(file).exists() for at, file in waits):
            time.sleep(0.01)

    folder = mine.get("checkpoint")
    keeping = Keeping(checkpoint=folder, every=1 if folder else None, keep=100, resume=mine.get("resume"))
    main = train(way, half(number % 2), ROWS // 2, mine.get("steps", STEPS), False, after)
    played = play_one(Solo(), main, 1, keeping=keeping)
    weights, losses = played.result
    return {"weights": plain(weights), "losses": plain(losses), "standings": standings, "once": played.exactly_once}


def one_site(at: str, secret: str | None = None) -> samestep.Sites:
    codec, back = samestep.codecs.Feedback(samestep.codecs.Int8(block=16)), samestep.codecs.TopK(0.4)
    outer = samestep.Nesterov(0.5, 0.5)
    return samestep.Sites(at=at, name="alone", every=3, quorum=1, codec=codec, back=back, outer=outer, secret=secret)


def play_alone(group, at: str) -> str:
    """Program of a worker: play the script as one site of all workers."""
    return play_one(group, train(one_site(at), rows(), ROWS, steps=8, normed=True), 4).as_words()


def undisturbed(group: Any, at: str) -> str:
    """Program of a process: be site "a" or "b" of site_script.py; return the digest of its weights."""
    name = "ab"[group.worker.rank]
    way = site_script.way_of(at, name, None)
    return play_one(Solo(), lambda run: site_script.train(run, way, ord(name)), 4, seed=3).result


UNEVEN = [(6, 5), (2, 5)]
"""Samples per step, and steps, of each of two sites."""


def networks() -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    """Return a network with buffers, and two optimizers for parts of it."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
    first = torch.optim.SGD([*model[0].parameters(), *model[1].parameters()], lr=0.05)
    return model, [first, torch.optim.SGD(model[3].parameters(), lr=0.02, momentum=0.5)]


def uneven_rows(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the data of one of two sites."""
    each, steps = UNEVEN[number]
    x = torch.randn(each * steps, 3, generator=torch.Generator().manual_seed(number))
    return x, x.sum(1, keepdim=True) * (1 + number)


def uneven(group: Any, at: str) -> list[list[float]]:
    """Program of a process: be one of two sites of uneven data, with two optimizers; return all tensors, flat."""
    number = group.worker.rank
    way = samestep.Sites(at, f"site {number}", every=2, patience=30.0)

    def main(run: samestep.Run) -> Any:
        model, optimizers = networks()
        run.replicate(model, *optimizers, agree=way)
        each, steps = UNEVEN[number]
        for step in run.steps(uneven_rows(number), batch_size=each, steps=steps, shuffle=False):
            for optimizer in optimizers:
                for a, b in step:
                    step.backward((model(a) - b).square().mean())
                step.update(optimizer)
        return [t.double().flatten().tolist() for t in (*model.parameters(), *model.buffers())]

    return play_one(Solo(), main, 1).result


def uneven_by_hand() -> list[list[float]]:
    """Return what both come to, as the documentation has it."""
    sites = [networks() for _ in UNEVEN]
    outer = [t.detach().clone() for t in (*sites[0][0].parameters(), *sites[0][0].buffers())]

    def meet(items: list[int]) -> None:
        shares = [count / sum(items) for count in items]
        tensors = [[*model.parameters(), *model.buffers()] for model, _ in sites]
        for index, new in enumerate(outer):
            if new.is_floating_point():
                new.copy_(sum(share * own[index].detach() for share, own in zip(shares, tensors, strict=True)))
            else:
                new.copy_(tensors[0][index])
            for own in tensors:
                own[index].data.copy_(new)

    counts = [0, 0]
    for step in range(5):
        for number_of_update in range(2):
            for number, (model, optimizers) in enumerate(sites):
                each = UNEVEN[number][0]
                x, y = (t[step * each : (step + 1) * each] for t in uneven_rows(number))
                for optimizer in optimizers:
                    optimizer.zero_grad()
                (model(x) - y).square().mean().backward()
                optimizers[number_of_update].step()
                counts[number] += each
            # After the first update of every second step, and at the end.
            if (step % 2, number_of_update) == (1, 0) or (step, number_of_update) == (4, 1):
                meet(counts)
                counts = [0, 0]
    return [t.double().flatten().tolist() for t in outer]
