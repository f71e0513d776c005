"""Runs on several sites that agree now and then, over a meeting place that any of them can reach.

    update     as the replicas of the site agree; after every so many, the first worker of the site goes to the meeting
               place with what the site has learned, and all go on from the weights that it brings back
    no answer  the site goes on alone; the same contribution is given again the next time, and what was learned since
               stays

[Note: once]
What is given has a number, and counts once under it. A run that starts again from an earlier state, after whatever
fault, makes steps again that the others know of already; what it gives under known numbers is not counted, and it is
told what there is now. So that it starts from the answer to its last contribution but one at least, and gives the same
as before, its state is kept in memory after each answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from samestep.agree.agreement import Agreement
from samestep.agree.meeting import Outcome, Part, Request
from samestep.agree.outer import Average, Outer
from samestep.agree.synchronous import LiveSynchronous, Synchronous
from samestep.codecs import Codec, Exact
from samestep.core.arena import Arena
from samestep.core.calls import line_of_user
from samestep.core.model import Options
from samestep.core.worker import Wish
from samestep.errors import SettingsError
from samestep.sites.errand import Errand
from samestep.sites.proof import read_secret
from samestep.sites.site import Site
from samestep.sites.terms import to_values
from samestep.sites.visitor import Visitor, address_of
from samestep.storage import wire


@dataclass(frozen=True)
class Sites(Agreement):
    """Runs on several sites train by themselves, and agree every so many steps. Sites may be late, be lost, and come.

    Each site is a run of its own, with its own workers, checkpoints and data. `samestep meet` is the place where they
    agree.

    Args:
        at: the meeting place, "host:port".
        name: of this site; each has another.
        every: steps of a site from one contribution to the next.
        outer: what becomes of the mean of what the sites learned.
        codec: how that is compressed on its way, with error feedback where it leaves something out.
        back: how what a round changes is compressed on its way back, likewise; whole weights come back by default.
        quorum: sites that a round needs.
        patience: seconds for which a round waits for further sites after that.
        bound: rounds that the weights may be old from which a late contribution is measured; older ones do not count.
        reach: seconds for which this site tries to reach the place before it goes on alone.
        secret: file with the secret that the place knows too; not needed on one machine.
        inner: how the replicas of one site agree at every step.
    """

    at: str = field(repr=False)
    name: str = field(repr=False)
    every: int = 64
    outer: Outer = field(default_factory=Average)
    codec: Codec = field(default_factory=Exact)
    back: Codec = field(default_factory=Exact)
    quorum: int = 2
    patience: float = 60.0
    bound: int = 8
    reach: float = field(default=60.0, repr=False)
    secret: str | None = field(default=None, repr=False)
    inner: Synchronous = field(default_factory=Synchronous)

    def __post_init__(self) -> None:
        address_of(self.at)
        if not isinstance(self.name, str) or not 0 < len(self.name) <= 100 or not self.name.isprintable():
            raise SettingsError(f"You set Sites(name={self.name!r}); use a name of 1 to 100 characters.")
        for name, least in (("every", 1), ("quorum", 1), ("bound", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise SettingsError(f"You set Sites({name}={value!r}); it must be a whole number, {least} or more.")
        for name in ("patience", "reach"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
                raise SettingsError(f"You set Sites({name}={value!r}); it must be a number of seconds above 0.")
        if not isinstance(self.outer, Outer):
            raise SettingsError(f"You set Sites(outer={self.outer!r}); use Average(), Nesterov(lr=0.7), or alike.")
        for name in ("codec", "back"):
            if not isinstance(getattr(self, name), Codec):
                value = getattr(self, name)
                raise SettingsError(f"You set Sites({name}={value!r}); use samestep.codecs.Int8() or alike.")
        if type(self.inner) is not Synchronous:
            raise SettingsError(f"You set Sites(inner={self.inner!r}); use Synchronous(), with a codec if you like.")
        self.settings()

    def prepare(self, options: Options) -> Options:
        return self.inner.prepare(options)

    def settings(self) -> dict[str, Any]:
        """Return, as plain values, what all sites must have set alike."""
        return {
            "outer": to_values(self.outer),
            "codec": to_values(self.codec),
            "back": to_values(self.back),
            "quorum": self.quorum,
            "patience": float(self.patience),
            "bound": self.bound,
        }

    def bind(self, model, group, calls, clock, tolerance=None, allowance=None) -> LiveSites:
        return LiveSites(self, model, group, calls, clock, tolerance, allowance)


class LiveSites(LiveSynchronous):
    """One worker's side: agrees within the site at every step, and with the others now and then."""

    recipe: Sites

    def __init__(self, *bound: Any):
        super().__init__(*bound)
        recipe = self.recipe
        self._site = Site(recipe.name, recipe.codec, recipe.back, self.model, self.group)
        host, port = address_of(recipe.at)
        visitor = Visitor(host, port, read_secret(recipe.secret, host), self._stops)
        terms = {"settings": recipe.settings(), **self._site.shapes()}
        self._errand = Errand(visitor, recipe.name, terms, recipe.reach, self._stops)

    @property
    def within(self) -> Synchronous:
        return self.recipe.inner

    def begin_pass(self) -> None:
        if not self._site.standing.has_joined:
            self._visit(line_of_user())
        super().begin_pass()

    def update(self, request: Request, part: Part) -> Outcome:
        outcome = super().update(request, part)
        standing = self._site.standing
        if not outcome.skipped:
            standing.items += request.num_samples - len(outcome.bad)
        # A step may have several updates.
        standing.updates += request.seeds[2] == 0
        if standing.updates - standing.visited >= self.recipe.every and self._may_give:
            self._visit(request.where)
            # What the step takes does not hold for how long the next one may take.
            self.clock.begin_step(request.seeds[1], False)
        return outcome

    def settle(self) -> None:
        if self._may_give or self._site.gift is not None:
            self._visit(line_of_user())

    def end(self) -> None:
        standing = self._site.standing
        if standing.has_joined and standing.items:
            self._visit(line_of_user())
        if standing.has_joined and self.group.worker.is_first:
            self._site.leave(self._errand)

    def reseat(self) -> None:
        super().reseat()
        self._site.reseat()

    def state(self) -> tuple[dict[str, torch.Tensor], Any]:
        (tensors, inner), (own, values) = super().state(), self._site.state()
        tensors = {f"{_INNER}{name}": tensor for name, tensor in tensors.items()}
        return {**tensors, **own}, {"inner": inner, **values}

    def load(self, tensors: Mapping[str, torch.Tensor], values: Any) -> None:
        super().load(_inner_of(tensors), values and values["inner"])
        if values:
            self._site.load(tensors, values)
        self.group.exchange(b"")

    def adopt(self, tensors: Mapping[str, torch.Tensor], values: Any) -> None:
        """Take the weights alone: what this site gives next is measured from what it was told last."""
        super().load(_inner_of(tensors), values and values["inner"])

    def take_over(self, values: Any) -> None:
        super().take_over(values["inner"])
        self._site.take(values)

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "agreement": repr(self.recipe), "site": asdict(self._site.standing)}

    @property
    def _may_give(self) -> bool:
        """Whether there is something to give; not in the first step, since where it joined is kept at its end."""
        standing = self._site.standing
        is_first_step = not standing.has_given and standing.updates == standing.given + 1
        return standing.has_joined and standing.items > 0 and not is_first_step

    def _stops(self) -> bool:
        """Return whether to give up waiting: the run is to end, or to go on without somebody."""
        has_died = isinstance(self.group, Arena) and self.group.deaths.are_unanswered
        return has_died or self.calls.is_ordered(Wish.STOP)

    def _visit(self, where: str) -> None:
        """Let the first worker go to the meeting place, and all go on from what it brings. Collective."""
        integrity, guard, group = self.model.integrity, self.model.guard, self.group
        is_watching = integrity.is_watching
        if not integrity.verify(self.calls, "the round of sites (verify)", "before the round of sites"):
            guard.check()
        self.calls.meet("the round of sites (begin)", where)
        guard.open()
        frame = b""
        if group.worker.is_first:
            # What is told now is to be kept at the end of this step.
            self.calls.ask(Wish.SNAPSHOT)
            before = self.clock.to("wait")
            frame = wire.pack(self._site.go(self._errand))
            self.clock.to(before)
        told = wire.unpack(self.calls.meet("the round of sites (end)", where, None, frame)[0][1])
        self._site.take(told)
        if not group.shares_memory:
            self.model.share_weights()
        if told["buffers"] is not None and self.model.buffers.num_bytes:
            self.model.buffers.now.copy_(told["buffers"])
        guard.accept_update()
        integrity.watch(is_watching)


_INNER = "inner."


def _inner_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(_INNER): t for name, t in tensors.items() if name.startswith(_INNER)}
