"""The audits of a run: one worker plays a shard of another one after its own, and all hear whether the bits agree."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

from samestep.core.audit import Account, Draw, draw, is_due, place, verdict
from samestep.core.calls import Calls, line_of_user
from samestep.core.group import Group
from samestep.core.model import Model
from samestep.data.loading import Shard
from samestep.data.split import Slice, shard_bounds
from samestep.errors import IntegrityError, SettingsError
from samestep.storage.digest import state_digest

Again = Callable[[], Generator[Any, None, Account]]
"""Plays the audited shard here, by the user's loop, and returns what came of it. It counts for nothing."""


class Audits:
    """One worker's part in them.

    Attributes:
        num_agreed: shards so far that two workers (or a lone one twice) came to the same bits in.
    """

    def __init__(self, share: float, model: Model, group: Group, calls: Calls):
        """Take the user's choice.

        Args:
            share: of the passes in which there is one, 0..1.
            model: what is trained.
            group: the workers.
            calls: where they meet.

        Raises:
            SettingsError: `share` is none.
        """
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise SettingsError(
                f"You set audit={share!r}; use the share of updates in which one shard is computed twice, such as "
                f"1/64, or 1 for all of them, or 0 for none."
            )
        self._share = share
        self._model = model
        self._group = group
        self._calls = calls
        self.num_agreed = 0

    def draw(self, seeds: tuple[int, int, int], batch: Slice, num_replicas: int) -> Draw | None:
        """Return what is audited in a pass; None if nothing is. The same on every worker.

        Args:
            seeds: (seed, step, pass).
            batch: the positions of its data.
            num_replicas: number of replicas.
        """
        if not is_due(self._share, seeds):
            return None
        bounds = shard_bounds(batch.start, batch.stop, num_replicas)
        replicas = [replica for replica, (start, stop) in enumerate(bounds) if start < stop]
        return draw(seeds, replicas, self._model.division.runs)

    def settle(
        self, drawn: Draw, own: Account | None, again: Again, describe: Callable[[int], str]
    ) -> Generator[Any, None, None]:
        """Compare what came of the audited shard. Called by every worker when its own shards are played.

        Args:
            drawn: what is audited.
            own: what came of it on the worker that plays it.
            again: plays it.
            describe: (replica) -> words that name the shard, for messages.

        Raises:
            IntegrityError: it is not the same; on every worker alike, and again at every later call.
        """
        rank = self._group.worker.rank
        checked = (yield from again()) if rank == drawn.auditor else None
        told = self._meet([own and own.to_facts(), checked and checked.to_facts()])
        first, second = Account(**told[drawn.player][0]), Account(**told[drawn.auditor][1])
        if first.samples != second.samples:
            return
        names = [trained.weights.names for trained in self._model.trained]
        what = first.differences(second, names)
        if not what:
            self.num_agreed += any(first.gradients)
            return
        once_more = yield from again()
        met = self._meet([place(rank, self._group.worker.device), once_more.to_facts()])
        results = [(drawn.player, first), (drawn.auditor, second)]
        results += [(other, Account(**account)) for other, (_, account) in enumerate(met)]
        places = [words for words, _ in met]
        # Should the script swallow it, it comes again: the sums hold what may be wrong.
        self._calls.halt(IntegrityError(verdict(describe(drawn.replica), places, results, what)))

    def facts(self) -> dict[str, Any]:
        """Return how many shards were audited."""
        return {"audited": self.num_agreed}

    def _meet(self, value: Any) -> list[Any]:
        with self._group.mendable():
            return [told for told, _ in self._calls.meet("the audit of a shard", line_of_user(), value)]


class Ear:
    """Listens to what comes of a shard while it is played."""

    def __init__(self, model: Model, shard: Shard | None):
        """Listen from now on: the shard is about to be played."""
        self._model = model
        self._samples = state_digest({"ids": shard.ids if shard is not None else None})
        self._data = _digest(shard.batch) if shard is not None else ""
        self._seen: list[dict[int, int]] = [{} for _ in model.trained]
        for trained, seen in zip(model.trained, self._seen, strict=True):
            trained.gradients.seen = seen

    def account(self, losses: Sequence[tuple[int, float, float]], replica: int) -> Account:
        """Return what came of the shard of `replica`, which has ended; `losses` are (replica, loss, count)."""
        for trained in self._model.trained:
            trained.gradients.seen = None
        return Account(
            samples=self._samples,
            data=self._data,
            losses=[[float(loss).hex(), float(count).hex()] for r, loss, count in losses if r == replica],
            gradients=[[list(pair) for pair in sorted(seen.items())] for seen in self._seen],
        )


def _digest(batch: Any) -> str:
    try:
        return state_digest(batch)
    except TypeError:
        return ""
