"""The meeting place: who takes part, what they bring, and when a round is made of it.

What a round has made is on disk before anybody is told of it; a disk that fails is told, and the rounds go on.
"""

from __future__ import annotations

import contextlib
import math
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from samestep.errors import CheckpointError, MismatchError, UsageError
from samestep.sites import departures
from samestep.sites.outer_state import Content, OuterState
from samestep.sites.table import Answer, Gift, Table
from samestep.sites.terms import check_alike
from samestep.storage import checkpoint

_KEPT = 2
"""States on disk."""


class Place:
    """One training's meeting place. Its methods may be called from several threads.

    Attributes:
        terms: what the first site brought: the settings that all share, shapes and dtypes; None before.
        training: names what the sites learn together; another one has other weights at the same rounds.
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
        self._listener = tell
        self._changed = threading.Condition()
        self._contents: dict[str, Content] = {}
        self.terms: dict[str, Any] | None = None
        self.training = secrets.token_hex(8)
        if folder is not None:
            checkpoint.prepare(folder)
            if checkpoint.steps_in(Path(folder)):
                self._load(folder)

    def join(
        self, site: str, life: str, terms: dict[str, Any], start: dict[str, Any] | None, known: tuple[int, int]
    ) -> dict[str, Any] | None:
        """Let a site take part.

        Args:
            site: its name.
            life: of its run.
            terms: what it has set, and its shapes and dtypes.
            start: its weights and buffers, and the training that they belong to; they count if it is the first, or
                knows more rounds than this place, which has lost them then.
            known: rounds that it knows of, -1 if it has not joined before; and the number of its last contribution
                that was answered.

        Returns:
            The number of its last contribution, and the newest state unless it comes again; None if it has to come with
            its weights.

        Raises:
            MismatchError: it has set something else than the others.
            ValueError: the terms cannot be read, or the weights are others than they say.
        """
        with self._changed:
            num_rounds, sequence = known
            if self.terms is not None:
                check_alike(terms, self.terms, site)
            if self.terms is None or num_rounds > self._table.num_rounds:
                if start is None:
                    return None
                self._begin(terms, start["weights"], start["buffers"])
                self._go_on_from(site, life, num_rounds, sequence, start["training"])
                self._keep()
            with departures.kept(self._folder, self.training, self._table, self._tell):
                sequence = self._table.join(site, life)
            is_back = num_rounds >= 0
            self._tell(f"Site {site!r} {'is back' if is_back else 'takes part'}; {self._counted()}.")
            self._changed.notify_all()
            if is_back:
                return {}
            return {"last": sequence, "training": self.training, **self._outer.state(self._table.num_rounds)}

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
            self._table_now()
            self._outer.check(content)
            if gift.site not in self._table.lives:
                raise UsageError(f"Site {gift.site!r} has not joined since this meeting place was started.")
            with departures.kept(self._folder, self.training, self._table, self._tell):
                answer = self._table.give(gift, content.training != self.training)
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
                words = f"is {behind} rounds behind" if content.training == self.training else "was in another training"
                self._tell(f"Site {gift.site!r} {words}; what it learned since counts in none.")
            if answer is Answer.OVERLAPS:
                self._tell(f"Part of what site {gift.site!r} learned counts already, so the rest of it counts in none.")
            return answer

    def leave(self, site: str, life: str) -> None:
        """Wait for a site no more: its run has come to its end."""
        with self._changed:
            table = self._table_now()
            with departures.kept(self._folder, self.training, table, self._tell):
                table.leave(site, life)
            self._tell(f"Site {site!r} has come to its end; {self._counted()}.")
            self._changed.notify_all()

    def newest(self) -> dict[str, Any]:
        """Return the newest state.

        Raises:
            UsageError: nobody has joined.
        """
        with self._changed:
            self._table_now()
            return {"training": self.training, **self._outer.state(self._table.num_rounds)}

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
                    known = {"made": made, "last": self._table.known(site), "training": self.training}
                    return {**known, **self._outer.since(base, self._table.num_rounds)}
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
            return None if self.terms is None else self._outer.largest

    def _begin(self, terms: dict[str, Any], weights: list[torch.Tensor], buffers: torch.Tensor) -> None:
        """Begin with the weights of the first site."""
        settings = terms["settings"]
        quorum, patience, bound = (settings[name] for name in ("quorum", "patience", "bound"))
        if type(quorum) is not int or quorum < 1 or type(bound) is not int or bound < 0:
            raise ValueError("quorum and bound are whole numbers")
        if type(patience) is not float or not 0 < patience < math.inf:
            raise ValueError("patience is a number of seconds")
        self._outer = OuterState(terms, weights, buffers)
        self._table = Table(quorum, patience, bound)
        self._contents.clear()
        self.terms = terms

    def _go_on_from(self, site: str, life: str, num_rounds: int, sequence: int, training: str) -> None:
        """Take over what a site knows of the training, with whose weights this begins."""
        if num_rounds < 0:
            self._tell(f"Site {site!r} brought the weights that all start from.")
            return
        self.training = training
        self._table.num_rounds = num_rounds
        departures.load(self._folder, self.training, self._table)
        self._table.last[site] = Gift(site, sequence, sequence, num_rounds, 1.0, life, num_rounds)
        self._tell(
            f"This place has lost what it knew: it goes on from the weights after round {num_rounds}, which site "
            f"{site!r} brought; the outer optimizer begins anew. Keep it on disk: --keep DIR."
        )

    def _tell(self, text: str) -> None:
        """Say something; that nobody listens any more changes nothing."""
        with contextlib.suppress(OSError, ValueError):
            self._listener(text)

    def _table_now(self) -> Table:
        if self.terms is None:
            raise UsageError("Nobody has joined yet: this meeting place was started anew.")
        return self._table

    def _make_round(self) -> None:
        contents = [self._contents[site] for site in sorted(self._table.open)]
        try:
            self._outer.make(contents, self._table.num_rounds)
        except (ArithmeticError, MemoryError, RuntimeError) as error:
            void = self._table.close(is_void=True)
            given = ", ".join(gift.site for gift in void)
            self._tell(f"No round can be made of what {given} gave, so it counts in none: {error}")
            self._contents.clear()
            self._changed.notify_all()
            return
        gifts = self._table.close()
        self._contents.clear()
        self._keep()
        late = [g.site for g in gifts if g.base < self._table.num_rounds - 1]
        words = f"; of an earlier one: {', '.join(late)}" if late else ""
        self._tell(f"Round {self._table.num_rounds}: {', '.join(g.site for g in gifts)}{words}.")
        self._changed.notify_all()

    def _counted(self) -> str:
        return f"{len(self._table.present)} present, {self._table.num_rounds} rounds made"

    def _keep(self) -> None:
        """Write everything to disk, if there is a folder."""
        if self._folder is None:
            return
        folder, step = Path(self._folder), self._table.num_rounds
        weights, tensors, numbers = self._outer.to_checkpoint()
        facts = {"terms": self.terms, "training": self.training, "table": self._table.to_values(), "outer": numbers}
        try:
            checkpoint.write(folder, step=step, weights=weights, state=tensors, facts=facts)
            checkpoint.keep(folder, _KEPT, trusted=checkpoint.path_of(folder, step))
        except CheckpointError as error:
            self._tell(f"ROUND {step} IS NOT ON DISK: {error}")

    def _load(self, folder: str) -> None:
        saved, skipped = checkpoint.load_newest(folder)
        try:
            weights = [saved.weights[f"{i}"] for i in range(len(saved.weights))]
            facts = saved.facts
            self._begin(facts["terms"], weights, saved.state.get("buffers", torch.empty(0, dtype=torch.uint8)))
            self.training = facts["training"]
            self._table.load(facts["table"])
            departures.load(self._folder, self.training, self._table)
            self._outer.load(saved.state, facts["outer"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{saved.path} is not the state of a meeting place. Name another folder.") from error
        for one in skipped:
            # Its round is made again, and must find room.
            aside = checkpoint.set_aside(one.path)
            self._tell(f"Passed over, and moved to {aside}: {one.reason}")
        self._tell(f"Goes on after round {self._table.num_rounds}, from {saved.path}.")
