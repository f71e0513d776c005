"""The meeting place: the weights that all sites start from, and what becomes of what they bring.

A round adds the sites' contributions along the tree, in the order of their names, each with the share of its samples,
and gives the sum to the outer optimizer as a gradient. Buffers become the mean of the sites' own. Where the way back is
compressed, what a round changes is encoded, with error feedback, and the weights become what a site that decodes it
comes to. What a round has made is on disk before anybody is told of it.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from samestep.codecs import Exact, Feedback, State
from samestep.core.buffers import join
from samestep.core.tree import middle
from samestep.errors import CheckpointError, MismatchError, NonFiniteError, StorageError, UsageError
from samestep.sites.table import Answer, Gift, Table
from samestep.sites.terms import check_alike, codec_of, from_values
from samestep.storage import checkpoint, wire
from samestep.storage.digest import tensors_digest

_KEPT = 2
"""States on disk."""
_NUMBER = zlib.crc32(b"the meeting place")


@dataclass(frozen=True)
class Content:
    """What a contribution holds.

    Attributes:
        gift: whose it is.
        step: what the codec is to be at.
        payload: every parameter encoded, one after the other; uint8.
        buffers: the site's, uint8.
    """

    gift: Gift
    step: int
    payload: torch.Tensor
    buffers: torch.Tensor


class Place:
    """One training's meeting place. Its methods may be called from several threads.

    Attributes:
        terms: what the first site brought: the settings that all share, shapes and dtypes; None before.
    """

    def __init__(self, folder: str | None = None, tell: Callable[[str], None] = print):
        """Begin anew, or with the newest state in a folder.

        Args:
            folder: where what rounds make is kept; nowhere without.
            tell: is given a line of text now and then.

        Raises:
            CheckpointError: the folder holds states, and none of them can be read.
        """
        self._folder = folder
        self._tell = tell
        self._changed = threading.Condition()
        self._contents: dict[str, Content] = {}
        self._answer = b""
        self.terms: dict[str, Any] | None = None
        if folder is not None:
            checkpoint.prepare(folder)
            if checkpoint.steps_in(Path(folder)):
                self._load(folder)

    def join(
        self, site: str, life: str, terms: dict[str, Any], start: dict[str, Any] | None, again: bool
    ) -> dict[str, Any] | None:
        """Let a site take part.

        Args:
            site: its name.
            life: of its run.
            terms: what it has set, and its shapes and dtypes.
            start: its weights and buffers, which count if it is the first.
            again: it has joined before, and knows where it stands.

        Returns:
            The number of its last contribution, and the newest state unless it comes again; None if it has to come with
            its weights.

        Raises:
            MismatchError: it has set something else than the others.
            ValueError: the terms cannot be read, or the weights are others than they say.
        """
        with self._changed:
            if self.terms is None:
                if start is None:
                    return None
                self._begin(terms, start["weights"], start["buffers"])
                self._keep()
                self._tell(f"Site {site!r} brought the weights that all start from.")
            check_alike(terms, self.terms, site)
            sequence = self._table.join(site, life)
            self._tell(f"Site {site!r} {'is back' if again else 'takes part'}; {self._counted()}.")
            self._changed.notify_all()
            return {} if again else {"sequence": sequence, **self._state()}

    def give(self, content: Content) -> Answer:
        """Take a contribution.

        Raises:
            UsageError: the site has not joined.
            ValueError: it is not what was agreed on.
            NonFiniteError: it holds NaN or infinity.
            MismatchError: another run has joined under this name since.
        """
        gift = content.gift
        with self._changed:
            self._check(content)
            if gift.site not in self._table.lives:
                raise UsageError(f"Site {gift.site!r} has not joined since this meeting place was started.")
            answer = self._table.give(gift)
            if answer is Answer.OTHER:
                raise MismatchError(
                    f"Another run has joined as site {gift.site!r} since, and takes this one's place. If both are to "
                    f"take part, give each a name of its own: Sites(name=...)."
                )
            if answer is Answer.TAKEN:
                self._contents[gift.site] = content
                self._changed.notify_all()
            if answer is Answer.TOO_OLD:
                behind = self._table.num_rounds - gift.base
                self._tell(f"Site {gift.site!r} is {behind} rounds behind; what it learned since counts in none.")
            return answer

    def leave(self, site: str) -> None:
        """Wait for a site no more: its run has come to its end."""
        with self._changed:
            self._table_now().leave(site)
            self._tell(f"Site {site!r} has come to its end; {self._counted()}.")
            self._changed.notify_all()

    def newest(self) -> dict[str, Any]:
        """Return the newest state.

        Raises:
            UsageError: nobody has joined.
        """
        with self._changed:
            self._table_now()
            return self._state()

    def outcome(self, site: str, sequence: int, base: int, seconds: float) -> dict[str, Any] | None:
        """Return what became of a contribution, or None if that is not known after some seconds.

        Args:
            site: its name.
            sequence: number of the contribution.
            base: the round after which the site has the weights.
            seconds: to wait.

        Raises:
            UsageError: nobody has joined.
            KeyError: it was never given.
        """
        until = time.monotonic() + seconds
        with self._changed:
            self._table_now()
            while True:
                now = time.monotonic()
                due = self._table.due(now)
                if due == 0:
                    self._make_round()
                made = self._table.made(site, sequence)
                if made is not None:
                    return {"made": made, **self._since(base)}
                if now >= until:
                    return None
                self._changed.wait(min(until - now, due if due is not None else seconds))

    def missing(self) -> int:
        """Return how many more sites the next round needs."""
        with self._changed:
            return self._table_now().missing()

    def largest(self) -> int | None:
        """Return the bytes of the longest message that a site may send; None before the first has joined."""
        with self._changed:
            if self.terms is None:
                return None
            exact = sum(p.numel() * p.element_size() for p in self._parameters)
            return 2 * exact + 2 * self._buffers.numel() + 256 * len(self._parameters) + (1 << 16)

    def _begin(self, terms: dict[str, Any], weights: Sequence[torch.Tensor], buffers: torch.Tensor) -> None:
        """Begin with the weights of the first site."""
        shapes = [[list(w.shape), wire.name_of(w.dtype)] for w in weights]
        if shapes != terms["weights"] or buffers.dtype != torch.uint8 or buffers.numel() != terms["buffers"]["bytes"]:
            raise ValueError("The weights are others than the site says.")
        settings = terms["settings"]
        self._codec, back = codec_of(settings["codec"]), codec_of(settings["back"])
        self._back = back if back.unbiased or isinstance(back, Feedback) else Feedback(back)
        self._kept: list[State] = [self._back.fresh(w.shape, w.dtype) for w in weights]
        self._changes: deque[bytes] = deque(maxlen=settings["bound"] + 1)
        self._parameters = [torch.nn.Parameter(w.clone()) for w in weights]
        self._optimizer = from_values(settings["outer"]).make(self._parameters)
        self._buffers = buffers.clone()
        self._segments = [
            (slice(start, stop), None if name is None else wire.dtype_named(name))
            for start, stop, name in terms["buffers"]["segments"]
        ]
        self._table = Table(settings["quorum"], settings["patience"], settings["bound"])
        self.terms = terms

    def _table_now(self) -> Table:
        if self.terms is None:
            raise UsageError("Nobody has joined yet: this meeting place was started anew.")
        return self._table

    def _check(self, content: Content) -> None:
        self._table_now()
        codec = self._codec.at(content.step)
        stated = sum(codec.num_bytes(p.shape, p.dtype) for p in self._parameters)
        if content.payload.shape != (stated,) or content.payload.dtype != torch.uint8:
            raise ValueError(f"{stated} bytes are due, not {tuple(content.payload.shape)} of {content.payload.dtype}.")
        if content.buffers.shape != self._buffers.shape or content.buffers.dtype != torch.uint8:
            raise ValueError("The buffers are others than were agreed on.")
        if not all(bool(torch.isfinite(tensor).all()) for tensor in self._decoded(content)):
            raise NonFiniteError(
                f"What site {content.gift.site!r} learned holds NaN or infinity. Lower the learning rate, or clip with "
                f"step.update(clip_norm=1.0)."
            )

    def _decoded(self, content: Content) -> list[torch.Tensor]:
        codec, start, found = self._codec.at(content.step), 0, []
        for parameter in self._parameters:
            length = codec.num_bytes(parameter.shape, parameter.dtype)
            found.append(codec.decode(content.payload[start : start + length], parameter.shape, parameter.dtype))
            start += length
        return found

    def _make_round(self) -> None:
        gifts = self._table.close()
        contents = [self._contents[gift.site] for gift in gifts]
        self._contents.clear()
        total = sum(gift.items for gift in gifts)
        shares = [gift.items / total for gift in gifts]

        def summed(lo: int, hi: int) -> list[torch.Tensor]:
            if hi - lo == 1:
                return [tensor.mul_(shares[lo]) for tensor in self._decoded(contents[lo])]
            mid = middle(lo, hi)
            return [a.add_(b) for a, b in zip(summed(lo, mid), summed(mid, hi), strict=True)]

        before = [parameter.detach().clone() for parameter in self._parameters]
        for parameter, gradient in zip(self._parameters, summed(0, len(gifts)), strict=True):
            parameter.grad = gradient.to(parameter.dtype)
        self._optimizer.step()
        self._optimizer.zero_grad()
        # A difference of which nothing is left out is as long as the weights, which say it to the bit.
        if not isinstance(self._back, Exact):
            self._changes.append(self._encoded(before))
        if self._buffers.numel():
            join(self._segments, [content.buffers for content in contents], shares, self._buffers)
        self._answer = b""
        self._keep()
        late = [g.site for g in gifts if g.base < self._table.num_rounds - 1]
        words = f"; of an earlier one: {', '.join(late)}" if late else ""
        self._tell(f"Round {self._table.num_rounds}: {', '.join(g.site for g in gifts)}{words}.")
        self._changed.notify_all()

    def _encoded(self, before: Sequence[torch.Tensor]) -> bytes:
        """Return what the round changes, encoded, and let the weights be what comes of that."""
        step, payloads = self._table.num_rounds - 1, []
        codec = self._back.at(step)
        for index, (parameter, old) in enumerate(zip(self._parameters, before, strict=True)):
            payload = codec.encode(old - parameter.detach(), (_NUMBER, step, index), self._kept[index])
            parameter.data.copy_(old - codec.decode(payload, old.shape, old.dtype))
            payloads.append(payload)
        return bytes(wire.bytes_of(torch.cat(payloads)))

    def _since(self, base: int) -> dict[str, Any]:
        """Return what a site needs that has the weights of an earlier round: the changes since, or the newest state."""
        count = self._table.num_rounds - base
        if not 0 < count <= len(self._changes):
            return self._state()
        digest = tensors_digest((str(i), p.detach()) for i, p in enumerate(self._parameters))
        changes = list(self._changes)[-count:]
        return {"round": self._table.num_rounds, "changes": changes, "digest": digest, "buffers": self._buffers}

    def _state(self) -> dict[str, Any]:
        """Return the newest state: how many rounds are made, and `state`, weights and buffers as packed bytes."""
        if not self._answer:
            weights = [p.detach() for p in self._parameters]
            self._answer = wire.pack({"weights": weights, "buffers": self._buffers})
        return {"round": self._table.num_rounds, "state": self._answer}

    def _counted(self) -> str:
        return f"{len(self._table.present)} present, {self._table.num_rounds} rounds made"

    def _keep(self) -> None:
        """Write everything to disk, if there is a folder."""
        if self._folder is None:
            return
        assert self.terms is not None
        state = self._optimizer.state_dict()["state"]
        tensors = {f"outer.{i}.{name}": v for i, kept in state.items() for name, v in kept.items() if _is_tensor(v)}
        numbers = {i: {name: v for name, v in kept.items() if not _is_tensor(v)} for i, kept in state.items()}
        tensors |= {f"codec.{i}.{name}": v for i, kept in enumerate(self._kept) for name, v in kept.items()}
        weights = {f"{i}": p.detach() for i, p in enumerate(self._parameters)}
        if self._buffers.numel():
            tensors["buffers"] = self._buffers
        facts = {"terms": self.terms, "table": self._table.to_values(), "outer": numbers}
        folder, step = Path(self._folder), self._table.num_rounds
        try:
            checkpoint.write(folder, step=step, weights=weights, state=tensors, facts=facts)
            checkpoint.keep(folder, _KEPT, trusted=checkpoint.path_of(folder, step))
        except StorageError as error:
            self._tell(f"ROUND {step} IS NOT ON DISK: {error}")

    def _load(self, folder: str) -> None:
        saved, skipped = checkpoint.load_newest(folder)
        for one in skipped:
            self._tell(f"Passed over: {one.reason}")
        weights = [saved.weights[f"{i}"] for i in range(len(saved.weights))]
        try:
            facts = saved.facts
            self._begin(facts["terms"], weights, saved.state.get("buffers", torch.empty(0, dtype=torch.uint8)))
            self._table.load(facts["table"])
            state: dict[int, dict[str, Any]] = {int(i): dict(kept) for i, kept in facts["outer"].items()}
            for name, tensor in saved.state.items():
                role, _, rest = name.partition(".")
                index, _, key = rest.partition(".")
                if role == "outer":
                    state.setdefault(int(index), {})[key] = tensor
                elif role == "codec":
                    self._kept[int(index)][key] = tensor
            groups = self._optimizer.state_dict()["param_groups"]
            self._optimizer.load_state_dict({"state": state, "param_groups": groups})
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{saved.path} is not the state of a meeting place. Name another folder.") from error
        self._tell(f"Goes on after round {self._table.num_rounds}, from {saved.path}.")


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)
