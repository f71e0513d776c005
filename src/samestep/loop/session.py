"""What a run is made of: the group, the ledger, the data sets, the model. `Run` is its face to the user."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from samestep.agree.agreement import Live
from samestep.core.arena import Arena
from samestep.core.calls import Calls, Halted, line_of_user
from samestep.core.clock import Clock
from samestep.core.group import Group
from samestep.core.integrity import Integrity
from samestep.core.model import Model
from samestep.core.randomness import seed_evaluation
from samestep.core.worker import Wish, Worker
from samestep.errors import MismatchError, StorageError, UsageError
from samestep.loop.archive import Archive
from samestep.loop.audits import Audits
from samestep.loop.crew import Crew
from samestep.loop.feed import Feed
from samestep.loop.keeper import Keeper
from samestep.loop.mismatch import Conditions
from samestep.loop.pending import Pending
from samestep.loop.recipe import Keeping, Recipe
from samestep.loop.record import Record, combined
from samestep.loop.replay import Replay
from samestep.loop.supervision import Orders, Supervision
from samestep.storage import wire
from samestep.storage.digest import joined_digest, state_digest, tensors_digest
from samestep.storage.ledger import Ledger

_END = "the end of main"


class TraceEnded(Halted):
    """The steps asked for by `verify` are done."""


class Session:
    """The state of one worker's run.

    Attributes:
        recipe, keeping, group: as given.
        feeds: of each data set.
        keeper: writes down the state.
        replay: brings it back.
        num_replicas: number of replicas.
        clock, calls, ledger, record, conditions: see their classes.
        model: None until `run.replicate`.
        audits: compares shards that two workers play; None until then.
        whereabouts: says in which shard the script left the loop over them; empty if in none.
        num_reseeds: calls so far after which generators were seeded anew.
        crew: the workers, as they die and join.
        verifies: whether memory is looked at for flipped bits.
        pending: batches of which it is not known yet what became of their updates.
    """

    def __init__(
        self,
        recipe: Recipe,
        keeping: Keeping,
        group: Group,
        supervision: Supervision | None = None,
    ):
        """Begin a run; nothing of it is collective yet."""
        supervision = supervision if supervision is not None else Supervision()
        self.recipe = recipe
        self.keeping = keeping
        self.group = group
        self.num_replicas = recipe.num_replicas(group.worker.size)
        orders = supervision.orders
        self.clock = Clock(supervision.pulse)
        self.calls = Calls(group, self.clock, partial(_wishes, orders, group) if orders is not None else None)
        self.ledger = Ledger()
        self.record = Record(group, supervision.reporter, self.clock)
        self.conditions = Conditions(recipe, keeping, group.worker.device, self.record.note)
        self.model: Model | None = None
        self.audits: Audits | None = None
        self.whereabouts: Callable[[], str] = str
        self.num_reseeds = 0
        self.crew = Crew(group, self.calls, supervision)
        self.keeper = Keeper(self, supervision)
        self.replay = Replay(self, self.keeper, supervision)
        self.verifies = supervision.verifies
        self.feeds: dict[Any, Feed] = {}
        self.pending = Pending(self)
        self._planned: dict[str, Any] = {}

    @property
    def worker(self) -> Worker:
        """This worker, as it is now: ranks change where others die or join."""
        return self.group.worker

    @property
    def agreed(self) -> Live:
        """The live form of how replicas agree."""
        assert self.crew.agreed is not None
        return self.crew.agreed

    @property
    def archive(self) -> Archive:
        """Saves and restores the model."""
        assert self.model is not None
        return Archive(self.model, self.group, self.agreed)

    @property
    def integrity(self) -> Integrity:
        """Finds bits that flipped."""
        assert self.model is not None
        return self.model.integrity

    @property
    def replaying(self) -> bool:
        """Whether the script has not yet come to the point where the checkpoint was made."""
        return self.replay.saved is not None

    @property
    def silent(self) -> bool:
        """Whether what happens now was reported before."""
        return self.replay.silent

    def recorded(self, kind: str, make: Callable[[], Any], where: str | None = None, again: bool = False) -> Any:
        """Return what `make` gives, and record it; in a replay, what was recorded.

        Args:
            kind: what the script called.
            make: gives the value.
            where: the line of the script.
            again: `make` may be called again where a worker dies meanwhile.

        Raises:
            MismatchError: another call was recorded here.
        """
        where = where if where is not None else line_of_user()
        if self.ledger.replaying:
            return self.ledger.next(kind, where)
        saved = self.replay.saved
        if saved is not None:
            raise MismatchError(
                f"The script calls run.{kind} at {where} where the checkpoint {saved.path} was made: the script "
                f"changed. Restore it, or start anew in another folder."
            )
        value = self.crew.surviving(make) if again else make()
        self.ledger.append(kind, where, value)
        self.replay.took(len(self.ledger))
        return value

    def of_first(self, kind: str, make: Callable[[], Any]) -> Any:
        """Return on every worker what `make` gives on the first. Collective."""
        made: list[bytes] = []

        def tell() -> bytes:
            if self.worker.is_first and not made:
                made.append(wire.pack(make()))
            frame = made[0] if made else b""
            return self.calls.meet(f"run.{kind}", line_of_user(), None, frame)[0][1]

        return wire.unpack(self.crew.surviving(tell))

    def feed(self, data: Any, num_samples: int, kind: type[Feed] = Feed) -> Feed:
        """Return the feed of `data`, of that kind; the same one whenever the same data is given."""
        key = _identity(data)
        if key not in self.feeds:
            self.feeds[key] = kind(data, num_samples, (self.recipe.seed, len(self.feeds)))
        return self.feeds[key]

    def check_data(self, facts: dict[str, Any]) -> None:
        """Record what the steps are made of; in a replay compare with what was recorded.

        Raises:
            MismatchError: see `Conditions.check_worker_data` and `check_recorded_data`.
        """
        if not self.replaying:
            where = line_of_user()
            for rank, (theirs, _) in enumerate(self.crew.surviving(lambda: self.calls.meet("run.steps", where, facts))):
                self.conditions.check_worker_data(rank, theirs, facts)
        self.conditions.check_recorded_data(self.recorded("steps", lambda: facts), facts)

    def plan(self, num_samples: int, batch_size: Any, epochs: int | None, steps: int | None) -> None:
        """Note how long the steps will go on, for progress."""
        per_epoch = -(-num_samples // batch_size) if isinstance(batch_size, int) else None
        planned = steps if steps is not None else (per_epoch * epochs if per_epoch and epochs else None)
        self._planned = {
            "steps": self.record.num_steps + planned if planned is not None else None,
            "epochs": epochs,
        }

    def reseed(self) -> None:
        """Leave the generators the same on workers that ran different parts of a call, and in a replay."""
        self.num_reseeds += 1
        seed_evaluation(self.recipe.seed, self.num_reseeds, -1)

    def tell(self, step: int, epoch: int, loss: float) -> None:
        """Report a committed step."""
        if self.silent:
            return
        self.record.progress({"step": step + 1, "epoch": epoch + 1, "loss": loss, **self._planned})
        if self.keeping.trace is not None:
            assert self.model is not None
            self.record.trace(step, loss, self.model.named_tensors())
            if self.record.num_steps >= self.keeping.trace:
                self.calls.meet("run.steps (trace)", "")
                self.calls.halt(TraceEnded())

    def save(self, folder: str, where: str) -> None:
        """Write the checkpoint that the user asked for. Collective.

        Raises:
            StorageError: it could not be written. That is recorded too: a script may catch it, and a replay must tell
                it the same.
        """
        if self.replay.reach("save"):
            self.ledger.append("save", where, None)
            return

        def write() -> list[str] | None:
            try:
                self.keeper.write(folder, "save", None)
            except StorageError as error:
                return [str(error), error.reason]
            return None

        trouble = self.recorded("save", write, where)
        if trouble is not None:
            raise StorageError(*trouble)

    def finish(self, result: Any) -> dict[str, Any]:
        """Return the facts of the summary; on the first worker all of them. Collective."""
        if self.model is None:
            raise UsageError("main ended without run.replicate(...): nothing was trained.")
        # First of all: a worker may be here while others are still at their steps.
        self.calls.meet(_END, "")
        # The steps may have been left by `break`.
        self.pending.settle()
        self.replay.reach("finish")
        self.ledger.check_finished()
        if self.replay.saved is not None:
            saved = self.replay.saved.path
            raise MismatchError(f"The script ended before the point where the checkpoint {saved} was made.")
        self.agreed.end()
        self.keeper.at_end()
        weights = tensors_digest(self.model.named_tensors())
        states = [trained.update.full_state() for trained in self.model.trained]
        mine = {**self.record.facts(), **self.crew.facts(), "weights": weights}
        met = self.calls.meet(_END, "", mine)
        parts = [value for value, _ in met]
        for rank, part in enumerate(parts):
            if part["weights"] != parts[0]["weights"]:
                raise MismatchError(
                    f"Worker {rank} ended with other weights than worker 0 ({part['weights']} against "
                    f"{parts[0]['weights']}). Was a module changed by code that depends on the worker?"
                )
        proofs = [feed.proof() for feed in self.feeds.values()]
        self.model.release()
        if not all(p.holds for p in proofs):
            self.record.note("The samples that were read are not those that were due; see the line on samples.")
        return {
            "weights_digest": weights,
            "optimizer_digest": joined_digest((str(i), state_digest(s)) for i, s in enumerate(states)),
            "samples_digest": joined_digest((str(i), p.read.digest) for i, p in enumerate(proofs)),
            "samples_exactly_once": all(p.holds for p in proofs),
            "samples_sentence": "; ".join(_counted(Counter(p.in_words() for p in proofs))),
            "steps": self.record.num_steps,
            "replicas": self.num_replicas,
            "workers": self.worker.size,
            "threads": self.recipe.threads,
            "seed": self.recipe.seed,
            "device": self.worker.device,
            "seconds_total": self.clock.elapsed(),
            "state_bytes": self.model.state_bytes(),
            "snapshot_bytes": self.keeper.num_snapshot_bytes,
            "logged": self.record.logged,
            "notes": self.record.notes,
            **self.integrity.facts(),
            **self.agreed.facts(),
            **(self.audits.facts() if self.audits is not None else {}),
            **combined(parts),
            "samples": sum(p.read.num_samples for p in proofs),
        }


def _identity(data: Any) -> Any:
    """Return what tells data sets apart: the tensors of a tuple, dict or TensorDataset, or the object itself."""
    if isinstance(data, torch.utils.data.TensorDataset):
        return tuple(map(id, data.tensors))
    if isinstance(data, dict):
        return tuple((name, id(column)) for name, column in data.items())
    return tuple(map(id, data)) if isinstance(data, tuple) else id(data)


def _counted(sentences: Counter[str]) -> list[str]:
    return [f"{words} ({count} data sets)" if count > 1 else words for words, count in sentences.items()]


def _wishes(orders: Orders, group: Group) -> int:
    """Return what the first worker asks of all."""
    misses = isinstance(group, Arena) and group.deaths.are_unanswered
    return orders.pending() | (Wish.ANSWER if misses else 0)
