"""What `main` is given: one worker's view of the run.

Every method is called by all workers alike. During a replay (a resumed run executes `main` from its first line)
committed calls give what the ledger recorded, and the registered state is loaded after the last of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from samestep.agree.agreement import Agreement
from samestep.agree.allowance import Allowance, OnBadSample
from samestep.agree.federated import LiveFederated
from samestep.agree.nonfinite import Nonfinite, Tolerance
from samestep.agree.synchronous import Synchronous
from samestep.core.buffers import Rule
from samestep.core.calls import line_of_user
from samestep.core.model import Model, Options
from samestep.core.per_replica import PerReplica
from samestep.core.worker import Worker
from samestep.data.source import as_source
from samestep.data.split import schedule
from samestep.errors import SettingsError, UsageError
from samestep.federated.clients import Clients
from samestep.loop.audits import Audits
from samestep.loop.evaluation import Evaluation, evaluating
from samestep.loop.feed import Reading
from samestep.loop.rounds import Local, begin_rounds
from samestep.loop.session import Session
from samestep.loop.step import Step
from samestep.loop.stepping import Stepping, Walk
from samestep.storage.checkpoint import load_newest
from samestep.storage.digest import tensors_digest


class Run:
    """One worker's view of the run.

    Attributes:
        worker: this worker, as it is now; for logging. Results must not depend on it.
        recipe: what the result is a function of.
        num_replicas: number of replicas.
    """

    def __init__(self, session: Session):
        """Take what `settings` put together."""
        self._session = session
        self.recipe = session.recipe
        self.num_replicas = session.num_replicas
        self._stepping = Stepping(session)

    @property
    def worker(self) -> Worker:
        return self._session.worker

    @property
    def model(self) -> Model:
        if self._session.model is None:
            raise UsageError("Nothing is replicated yet. Call run.replicate(model, optimizer) first.")
        return self._session.model

    @property
    def elapsed(self) -> float:
        """Seconds since the run began, by the first worker's clock; the same on every worker, and in a replay."""
        session = self._session
        return session.recorded("elapsed", lambda: session.of_first("elapsed", session.clock.elapsed))

    def replicate(
        self,
        *things: Any,
        agree: Agreement | None = None,
        buffers: Rule | Mapping[str, Rule] = "mean",
        arrivals: str = "auto",
        nonfinite: Nonfinite = "stop",
        on_bad_sample: OnBadSample = "stop",
        audit: float = 0,
    ) -> None:
        """Make identical replicas of modules and optimizers on every worker, and register all for checkpoints.

        Parameters of modules of which an optimizer holds some are moved into memory that the workers of a host share.
        Other modules (an EMA copy, a frozen teacher) stay private to each worker, and must be changed alike on all.

        Args:
            things: modules, optimizers, schedulers, and whatever else has a state_dict.
            agree: how replicas agree; `Synchronous()` by default.
            buffers: "mean" or "first", or a dict of them by name pattern: how buffers of replicas are merged.
            arrivals: "many" where a parameter's gradient arrives several times in some shards only.
            nonfinite: what to do where a loss or gradient is NaN or infinite: "stop" with an error that names step,
                replica, samples and parameter; "skip" the update (`step.skipped` tells); or a number: skip so many in
                a row at most.
            on_bad_sample: what to do with a sample of `run.steps` whose reading raises, twice in a row: "stop" with
                an error that names it; "skip" it, so that the batch is what is left (`step.bad_samples` tells); or a
                number: skip so many different samples at most.
            audit: the share of updates, 0 to 1, in which one shard is computed by a second worker too (by the only one
                twice), and loss and gradients are compared bit by bit: 1/64 finds a processor that computes wrong.

        Raises:
            UsageError, MismatchError, SettingsError: something cannot be replicated, or workers built it differently,
                or checkpoints cannot be written where they were asked for.
        """
        if self._session.model is not None:
            raise UsageError("run.replicate was called twice. Give it everything in one call.")
        if arrivals not in ("auto", "many"):
            raise UsageError(f"You set arrivals={arrivals!r}; use 'auto' or 'many'.")
        tolerance, allowance = Tolerance(nonfinite), Allowance(on_bad_sample)
        options = Options(
            num_replicas=self.num_replicas,
            threads=self.recipe.threads,
            buffers=buffers,
            many_arrivals=arrivals == "many",
            read_only=self._session.keeping.trace is not None,
            verifies=self._session.verifies,
            seed=self.recipe.seed,
        )
        session = self._session
        session.conditions.begin(session.calls)
        recipe: Agreement = agree if agree is not None else Synchronous()
        if audit and recipe != Synchronous():
            raise SettingsError(
                f"You set audit={audit!r} and agree={recipe!r}: only gradients that are added as they are can be "
                f"computed again by another worker. Leave audit out, or use agree=Synchronous()."
            )
        session.model = session.crew.model = Model(things, session.group, recipe.prepare(options))
        session.crew.agreed = recipe.bind(
            session.model, session.group, session.calls, session.clock, tolerance, allowance
        )
        session.audits = Audits(audit, session.model, session.group, session.calls)
        session.replay.begin()
        session.model.integrity.watch()
        if session.keeping.checkpoint is not None and session.replay.newcomer is None:
            session.archive.prepare(session.keeping.checkpoint)

    def steps(
        self,
        data: Any,
        batch_size: int | Callable[[int], int],
        epochs: int | None = None,
        *,
        steps: int | None = None,
        shuffle: bool = True,
        collate: Callable[[list], Any] | None = None,
        loaders: int = 0,
        drop_last: bool = False,
    ) -> Iterator[Step]:
        """Return the steps over `data`. Called again for the same data, epochs go on counting.

        Args:
            data: a map-style dataset, a list, an array or tensor, a tuple or dict of arrays or tensors, or Clients.
            batch_size: samples per step over all replicas, or a function of the step's number; of Clients per batch.
            epochs: how many epochs; or
            steps: how many steps. Of Clients: `steps` rounds, in each of which one goes `epochs` times over its data.
            shuffle: whether each epoch has an order of its own (a function of seed and epoch), or the data's.
            collate: a list of samples -> a batch; torch's default_collate by default.
            loaders: processes per worker that read ahead.
            drop_last: leave out an epoch's last batch where it would be short.

        Raises:
            SettingsError, UsageError: settings that clash.
        """
        self.model  # noqa: B018  raises if nothing is replicated
        session = self._session
        # The steps before may have been left by `break`.
        session.pending.settle()
        if isinstance(data, Clients) or isinstance(session.agreed, LiveFederated):
            local = Local(batch_size, 1 if epochs is None else epochs, shuffle, collate, loaders, drop_last)
            return self._stepping.walk(*begin_rounds(session, data, local, steps))
        source = as_source(data, collate)
        feed = session.feed(data, len(source))
        feed.use_shuffle(shuffle)
        slices = schedule(
            len(source),
            batch_size,
            first_step=session.record.num_steps,
            first_epoch=feed.coverage.next_epoch,
            epochs=epochs,
            steps=steps,
            drop_last=drop_last,
        )
        given = batch_size if isinstance(batch_size, int) else "a function"
        facts = {"samples": len(source), "batch_size": given, "shuffle": shuffle, "drop_last": drop_last}
        session.check_data({**facts, "content": feed.content(source)})
        reading = Reading(
            seed=self.recipe.seed,
            shuffle=shuffle,
            num_replicas=self.num_replicas,
            replicas=session.crew.replicas,
            loaders=loaders,
            skip_bad=session.agreed.allowance.skips,
        )
        session.plan(len(source), batch_size, epochs, steps)
        return self._stepping.walk(Walk(feed, source, reading), slices)

    def mean(self, fn: Callable[[Any], Any], data: Any, batch_size: int, collate: Any = None) -> Any:
        """Return the mean of `fn` over all samples of `data`, each once, in eval mode and without gradients.

        Args:
            fn: batch -> a scalar mean over it, one value per sample, or a dict of these.
            data: as in `steps`.
            batch_size: samples that `fn` is given at a time.
            collate: as in `steps`.

        Returns:
            A float, or a dict of floats.
        """
        return _evaluate(self, "mean", fn, data, batch_size, collate)

    def gather(self, fn: Callable[[Any], Any], data: Any, batch_size: int, collate: Any = None) -> Any:
        """Return the per-sample results of `fn`, in the order of `data`, on every worker.

        Args:
            fn: batch -> a tensor or array with one row per sample, or a list with one entry per sample.
            data: as in `steps`.
            batch_size: samples that `fn` is given at a time.
            collate: as in `steps`.
        """
        return _evaluate(self, "gather", fn, data, batch_size, collate)

    def per_replica(self, make: Callable[[int], Mapping[str, torch.Tensor]]) -> PerReplica:
        """Keep state of each replica from step to step: recurrent state, environments, noise of its own.

        Inside `for batch in step` the result gives the tensors of the replica at hand, `state["hidden"]`; what a shard
        changes counts once the step's update is made.

        Args:
            make: replica -> tensors by name, of the same shapes and dtypes for all.

        Raises:
            UsageError: `make` returned something else, or steps overlap.
        """
        self._stepping.check_outside_shard("run.per_replica")
        model, session = self.model, self._session
        if session.agreed.overlaps:
            raise UsageError(f"run.per_replica was called under {session.agreed.recipe!r}, where steps overlap.")
        seeds = self.recipe.seed, session.num_reseeds
        model.states.append(PerReplica(make, seeds, len(model.states), model.division, session.group))
        session.reseed()
        return model.states[-1]

    def once(self, fn: Callable[[], Any]) -> Any:
        """Let one worker call `fn`, and return its result on all. The result is recorded.

        Args:
            fn: returns None, numbers, text, tensors, arrays, or lists, tuples and dicts of these.
        """
        self._stepping.check_outside_shard("run.once")
        result = self._session.recorded("once", lambda: self._session.of_first("once", fn))
        self._session.reseed()
        return result

    @contextmanager
    def edit(self) -> Iterator[None]:
        """Let the weights be edited in place inside the `with` block.

        The block runs on every worker, but what it does to shared weights counts once: that of the first worker.
        """
        self._stepping.check_outside_shard("run.edit")
        session, model = self._session, self.model
        if session.pending:
            session.pending.settle()
        if session.replaying:
            # What was edited then is in the checkpoint; now the block works on copies.
            model.detach()
            try:
                with torch.no_grad():
                    yield
            finally:
                model.attach(write=False)
            return
        session.agreed.settle()
        session.calls.meet("run.edit", line_of_user())
        model.integrity.verify(session.calls, "run.edit (verify)", f"at {line_of_user()}")
        model.guard.check()
        writes = self.worker.is_first or not session.group.shares_memory
        if not writes:
            model.detach()
        # None may edit before all have checked, and copied what is there to edit.
        session.calls.meet("run.edit (begin)", "")
        if writes:
            model.guard.open()
        try:
            with torch.no_grad():
                yield
        finally:
            model.attach(write=writes)
        session.calls.meet("run.edit (end)", "")
        if not session.group.shares_memory:
            model.share_weights()
        session.agreed.spread()
        model.guard.accept()
        model.integrity.watch()

    def save(self, path: str) -> None:
        """Write a checkpoint of everything registered into folder `path`. It can be resumed from.

        Raises:
            CheckpointError: it could not be written.
        """
        self._stepping.check_outside_shard("run.save")
        self.model  # noqa: B018
        self._session.save(str(path), line_of_user())

    def load(self, path: str) -> None:
        """Load weights and all registered state from a checkpoint, of any way to agree, without going back to its step.

        Raises:
            CheckpointError: there is no good one. MismatchError: it is of another model.
        """
        self._stepping.check_outside_shard("run.load")
        self.model  # noqa: B018
        session = self._session

        def restore() -> None:
            saved, skipped = load_newest(path)
            for skipped_path, reason in skipped:
                session.record.note(f"Checkpoint {skipped_path} was skipped: {reason}")
            session.archive.restore(saved, any_agreement=True)

        if session.pending:
            session.pending.settle()
        session.recorded("load", restore)

    def log(self, **scalars: float) -> None:
        """Show numbers in the progress line and keep the latest for the summary. Silent in a replay."""
        if not self._session.silent:
            self._session.record.logged.update({k: float(v) for k, v in scalars.items()})

    def digest(self) -> str:
        """Return the digest of all weights and buffers, 32 hexadecimal digits. The result is recorded."""
        self._stepping.check_outside_shard("run.digest")
        return self._session.recorded("digest", lambda: tensors_digest(self.model.named_tensors()), again=True)


def _evaluate(run: Run, kind: str, fn: Callable, data: Any, batch_size: int, collate: Any) -> Any:
    run._stepping.check_outside_shard(f"run.{kind}")
    where, session = line_of_user(), run._session

    def make() -> Any:
        with evaluating([module for _, module in run.model.modules]):
            source = as_source(data, collate)
            made = Evaluation(source, batch_size, run.worker, run.recipe.seed, session.num_reseeds)
            return getattr(made, kind)(fn, session.calls, where)

    result = session.recorded(kind, make, where, again=True)
    session.reseed()
    return result
