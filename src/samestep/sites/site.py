"""What one site has of its own: where it stands, what it measures from, and what it has given that nobody answered.

The first worker goes to the meeting place (`go`); the others take what it brings back.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from samestep.agree.coding import Coding
from samestep.codecs import Codec
from samestep.core.group import Group
from samestep.core.model import Model
from samestep.sites.baseline import Baseline
from samestep.sites.errand import Errand, Told
from samestep.sites.visitor import Unreachable
from samestep.storage import wire
from samestep.storage.digest import tensors_digest

_NOTHING = torch.empty(0, dtype=torch.uint8)
_ROLES = ("anchor", "mark")


@dataclass
class Standing:
    """Where a site stands; plain values.

    Attributes:
        round: rounds that were made when the place answered last; -1 before it has joined.
        training: to which they belong.
        updates: that it has made under its name; a contribution goes by the number of the last that is in it.
        given: number of its last contribution.
        known: number of the last that the place has told that it knows.
        visited: updates when it went to the place last.
        items: samples that it learned from since the last contribution; those of a step count for each of its updates.
        counted: contributions that were seen to count in a round.
        late: of these, how many in a later round than the next.
        refused: contributions that count in none, being too old.
        missed: how often the place could not be reached.
        num_bytes: of all contributions.
        has_given: whether it has given anything.
    """

    round: int = -1
    training: str = ""
    updates: int = 0
    given: int = 0
    known: int = 0
    visited: int = 0
    items: float = 0.0
    counted: int = 0
    late: int = 0
    refused: int = 0
    missed: int = 0
    num_bytes: int = 0
    has_given: bool = False

    @property
    def has_joined(self) -> bool:
        """Whether the place knows it."""
        return self.round >= 0


class Site:
    """One site, as one of its workers sees it.

    Attributes:
        name: of the site.
        standing: where it stands.
        gift: what was given, and not answered; the frame of `/give`.
    """

    def __init__(self, name: str, codec: Codec, back: Codec, model: Model, group: Group):
        """Begin before it has joined. Collective.

        Args:
            name: of the site.
            codec: how contributions are compressed.
            back: how changes are that come back.
            model: what was replicated.
            group: the workers.
        """
        self.name = name
        self.standing = Standing()
        self.gift: dict[str, Any] | None = None
        self._back = back
        self._model = model
        self._group = group
        # Sites with one seed draw other random numbers.
        self._number = zlib.crc32(name.encode())
        numbers = range(len(model.trained))
        self._baselines = [Baseline(model.trained[number], number, group) for number in numbers]
        self._codings = [Coding(codec, model, number, group, self._number) for number in numbers]

    def shapes(self) -> dict[str, Any]:
        """Return, in the first worker, what of the model must be alike on all sites."""
        weights = [[list(t.shape), wire.name_of(t.dtype)] for baseline in self._baselines for t in baseline.anchor]
        dtypes = [wire.name_of(view.dtype) for one in self._model.trained for view in one.weights.views]
        model = self._model
        buffers = model.buffers
        segments = [[w.start, w.stop, None if d is None else wire.name_of(d)] for w, d in buffers.segments]
        kept = {"bytes": buffers.num_bytes, "segments": segments}
        trained = {id(p) for one in model.trained for p in one.weights.parameters}
        parameters = [(n, t) for n, t in model.named_tensors() if isinstance(t, torch.nn.Parameter)]
        frozen = [(n, t) for n, t in parameters if id(t) not in trained]
        names = [name for one in model.trained for name in one.weights.names]
        kinds = {"weights": weights, "dtypes": dtypes, "names": names}
        return {**kinds, "buffers": kept, "frozen": tensors_digest(frozen)}

    def reseat(self) -> None:
        """Find its memory, in the group as it is now. Collective."""
        for baseline, coding in zip(self._baselines, self._codings, strict=True):
            baseline.reseat()
            coding.reseat()

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return what it keeps: tensors by name, and plain values. Collective."""
        tensors: dict[str, torch.Tensor] = {}
        for number, (baseline, coding) in enumerate(zip(self._baselines, self._codings, strict=True)):
            for role in _ROLES:
                tensors |= {f"{role}.{number}.{i}": t for i, t in enumerate(getattr(baseline, role))}
            tensors |= {f"codec.{number}.{name}": tensor for name, tensor in coding.state().items()}
        return tensors, {"standing": asdict(self.standing), "gift": self.gift}

    def load(self, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        """Take back what `state` gave."""
        if self._group.worker.is_first or not self._group.shares_memory:
            for number, (baseline, coding) in enumerate(zip(self._baselines, self._codings, strict=True)):
                for role in _ROLES:
                    for i, kept in enumerate(getattr(baseline, role)):
                        kept.copy_(tensors[f"{role}.{number}.{i}"])
                prefix = f"codec.{number}."
                coding.load({name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)})
        self.take(values)

    def take(self, values: Mapping[str, Any]) -> None:
        """Take the plain values that `state` or `go` gave; tensors lie in the group's memory."""
        self.standing, self.gift = Standing(**values["standing"]), values["gift"]

    def go(self, errand: Errand) -> dict[str, Any]:
        """Go to the meeting place. The first worker does it, and lands the weights that it brings.

        Returns:
            What the others take, see `take`; and `buffers` if they are new.
        """
        standing, buffers = self.standing, None
        if not standing.has_joined:
            told = errand.join(self._start)
            standing.updates = standing.given = told.last
            buffers = self._land(told, errand, since_mark=False)
        standing.visited = standing.updates
        is_new = False
        try:
            if self.gift is not None:
                landed = self._land(self._give(errand), errand, since_mark=True)
                # Else what the site has learned since is newer.
                buffers = buffers if standing.items else landed
            if standing.items:
                self.gift, is_new = self._encoded(), True
                buffers = self._land(self._give(errand), errand, since_mark=False)
        except Unreachable:
            standing.missed += 1
            for baseline in self._baselines if is_new else ():
                baseline.leave_mark()
        return {"standing": asdict(standing), "gift": self.gift, "buffers": buffers}

    def leave(self, errand: Errand) -> None:
        """Take leave of the others; the first worker does it."""
        errand.leave(self._start, (self.standing.round, self.standing.known))

    def _give(self, errand: Errand) -> Told:
        assert self.gift is not None
        return errand.give(self.gift, self._start, (self.standing.round, self.standing.known))

    def _encoded(self) -> dict[str, Any]:
        """Return what the site has learned since the last answer, as a contribution."""
        standing = self.standing
        step, first = standing.round, standing.given
        standing.given = standing.updates
        payloads = []
        for baseline, coding in zip(self._baselines, self._codings, strict=True):
            for index, difference in enumerate(baseline.difference()):
                payloads.append(coding.encode(step, self._number, index, difference))
            coding.commit()
        payload = torch.cat(payloads) if payloads else _NOTHING
        standing.num_bytes += payload.numel()
        gift = {
            "site": self.name,
            "sequence": standing.given,
            "first": first,
            "training": standing.training,
            "base": standing.round,
            "items": standing.items,
            "step": step,
            "payload": payload,
            "buffers": self._buffers(),
        }
        standing.items, standing.has_given = 0.0, True
        return gift

    def _land(self, told: Told, errand: Errand, since_mark: bool) -> torch.Tensor:
        """Go on from what the place told; return the buffers that belong to it."""
        standing = self.standing
        weights = told.weights if told.weights is not None else self._changed(told)
        if weights is None:
            told = errand.newest(told)
            weights = told.weights
        assert weights is not None
        if self.gift is not None:
            standing.counted += told.made > 0
            standing.late += told.made > self.gift["base"] + 1
            standing.refused += told.made < 0
            self.gift = None
        standing.round, standing.training = told.round, told.training
        standing.known = max(standing.known, told.last)
        for baseline in self._baselines:
            mine, weights = weights[: len(baseline.anchor)], weights[len(baseline.anchor) :]
            baseline.land(mine, since_mark)
        return told.buffers

    def _changed(self, told: Told) -> list[torch.Tensor] | None:
        """Return the weights that come of the anchors by the changes that were told; None if they are others there."""
        weights: list[torch.Tensor] = []
        for baseline in self._baselines:
            weights += [anchor.cpu().contiguous().clone() for anchor in baseline.anchor]
        for step, message in enumerate(told.changes, told.round - len(told.changes)):
            payload = torch.frombuffer(bytearray(message), dtype=torch.uint8)
            for weight, change in zip(weights, self._back.at(step).decode_all(payload, weights), strict=True):
                weight.sub_(change)
        return weights if tensors_digest((str(i), w) for i, w in enumerate(weights)) == told.digest else None

    def _start(self) -> dict[str, Any]:
        """Return the weights and buffers that others shall start from, if this site is the first."""
        weights = []
        for baseline, trained in zip(self._baselines, self._model.trained, strict=True):
            for anchor, view in zip(baseline.anchor, trained.weights.views, strict=True):
                weights.append((anchor if self.standing.has_joined else view).to(anchor.dtype).clone())
        return {"weights": weights, "buffers": self._buffers(), "training": self.standing.training}

    def _buffers(self) -> torch.Tensor:
        return self._model.buffers.now.clone() if self._model.buffers.num_bytes else _NOTHING
