"""Federated averaging: in each round some clients train on data of their own, and only what they did leaves them.

    sample    the clients of a round, and those lost, are functions of (seed, round)
    train     each goes some epochs over its own data, from the weights that all have, with an optimizer of its own
    pool      what they did is added up: see `pooling`
    apply     an outer optimizer takes the mean as a gradient

A step is a round, and its replicas are the round's clients: each worker plays a run of them, one after the other, with
room for one. Clients keep nothing from round to round. FedAvg (McMahan et al. 2017) is the default; FedProx `proximal`;
FedAvgM and FedAdam (FedOpt: Reddi et al. 2021) other outer optimizers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from samestep.agree.agreement import Agreement, Live
from samestep.agree.guest import Difference, Guest
from samestep.agree.meeting import Meeting, Outcome, Part, Request, absent_of, problem_of, terms_of
from samestep.agree.outer import Average, Outer
from samestep.agree.pooling import Noisy, Pool, Rows, Tree, Words
from samestep.agree.round import check_apart
from samestep.core.model import Options, Trained
from samestep.core.worker import Wish
from samestep.errors import SettingsError, UsageError
from samestep.federated.aggregation import Aggregation, WeightedMean
from samestep.federated.cohort import Cohort
from samestep.federated.masking import Masking
from samestep.federated.privacy import Privacy
from samestep.federated.sampling import drops_of, num_sampled, pace_of, poisson_of, sample_of
from samestep.storage import wire


@dataclass(frozen=True)
class Federated(Agreement):
    """Some clients train by themselves in each round, and all agree on the mean of what they did.

    Args:
        clients: how many there are, or the `Clients` themselves.
        sample: how many take part in a round: a share of all, above 0 and up to 1.0, or a whole number.
        outer: what becomes of the mean of what they did.
        proximal: how strongly a client is drawn back to the weights it started from (FedProx's mu).
        drop: probability with which a client that takes part is lost, in a simulation.
        deadline: samples that a client gets through in time, local epochs counted; who has more delivers too late and
            is left out. None: all are waited for.
        spread: in a simulation, a client takes 1 up to so many times as long as usual, drawn for each round.
        aggregate: how updates become one: `WeightedMean()`, `NormBound(limit)`, `TrimmedMean(share)`, `Median()`.
        secure: masks under which clients deliver, so that only their sum is seen.
        privacy: clipping, noise and a budget. Clients count once each then, not by their samples.
    """

    clients: int | Sized
    sample: float | int = 1.0
    outer: Outer = field(default_factory=Average)
    proximal: float = 0.0
    drop: float = 0.0
    deadline: float | None = None
    spread: float = 1.0
    aggregate: Aggregation = field(default_factory=WeightedMean)
    secure: Masking | None = None
    privacy: Privacy | None = None

    def __post_init__(self) -> None:
        if isinstance(self.clients, Sized):
            object.__setattr__(self, "clients", len(self.clients))
        if not isinstance(self.clients, int) or isinstance(self.clients, bool) or self.clients < 1:
            raise SettingsError(
                f"You set Federated(clients={self.clients!r}); give the Clients, or how many there are, 1 or more."
            )
        num_sampled(self.sample, self.clients)
        for name, good, words in (
            ("proximal", self.proximal >= 0, "0 or more"),
            ("drop", 0 <= self.drop < 1, "a probability, 0 or more and below 1"),
            ("deadline", self.deadline is None or self.deadline > 0, "above 0, in samples"),
            ("spread", self.spread >= 1, "1 or more"),
        ):
            value = getattr(self, name)
            if not good or (value is not None and not math.isfinite(value)):
                raise SettingsError(f"You set Federated({name}={value!r}); it must be {words}.")
        for name, kind, words in (
            ("outer", Outer, "Average(), Momentum(lr=1.0), Adaptive(lr=0.01), or alike"),
            ("aggregate", Aggregation, "WeightedMean(), NormBound(1.0), TrimmedMean(0.1) or Median()"),
            ("secure", Masking | None, "Masking(numbers=FixedPoint(limit=1.0)), or None"),
            ("privacy", Privacy | None, "Privacy(clip=1.0, noise=1.0, delta=1e-5), or None"),
        ):
            if not isinstance(getattr(self, name), kind):
                raise SettingsError(f"You set Federated({name}={getattr(self, name)!r}); use {words}.")
        if self.secure is not None and self.aggregate.needs_all:
            raise SettingsError(
                f"You set Federated(secure=..., aggregate={self.aggregate!r}), which looks at every client's update, "
                f"while secure aggregation shows their sum alone. Leave one of the two out."
            )
        if self.privacy is not None and type(self.aggregate) is not WeightedMean:
            raise SettingsError(
                f"You set Federated(privacy=..., aggregate={self.aggregate!r}): the noise is measured for a mean of "
                f"clipped updates. Leave aggregate out; clipping bounds each client's part already."
            )

    @property
    def num_clients(self) -> int:
        """How many clients there are."""
        assert isinstance(self.clients, int)
        return self.clients

    @property
    def is_poisson(self) -> bool:
        """Whether each client takes part in a round on its own, so that their number varies."""
        return self.privacy is not None and self.privacy.sampling == "poisson"

    @property
    def rate(self) -> float:
        """The probability with which a client takes part in a round."""
        if self.is_poisson and isinstance(self.sample, float):
            return self.sample
        return num_sampled(self.sample, self.num_clients) / self.num_clients

    @property
    def num_leaves(self) -> int:
        """The most clients that a round can have."""
        return self.num_clients if self.is_poisson else num_sampled(self.sample, self.num_clients)

    @property
    def expects_finite(self) -> bool:
        """Whether a client whose update is not finite is an error; else it is left out."""
        return type(self.aggregate) is WeightedMean and self.privacy is None

    @property
    def covers_buffers(self) -> bool:
        """Whether buffers may be treated as weights are: by a mean that all may see."""
        return self.expects_finite and self.secure is None

    def cohort(self, number: int, seed: int, lengths: Sequence[int], epochs: int) -> Cohort:
        """Return the clients of a round.

        Args:
            number: the round's number.
            seed: the run's.
            lengths: samples of each client.
            epochs: how often a client goes over its data.
        """
        if self.is_poisson:
            drawn = poisson_of(number, self.rate, self.num_clients, seed)
        else:
            drawn = sample_of(number, self.sample, self.num_clients, seed)
        lost = set(drops_of(number, self.drop, drawn, seed))
        if self.deadline is not None:
            paces = {client: pace_of(number, self.spread, client, seed) for client in drawn}
            lost |= {client for client in drawn if lengths[client] * epochs * paces[client] > self.deadline}
        return Cohort(
            seed=seed,
            number=number,
            samples={client: lengths[client] for client in drawn},
            lost=frozenset(lost),
            num_leaves=self.num_leaves,
            divisor=None if self.privacy is None else self.rate * self.num_clients,
        )

    def prepare(self, options: Options) -> Options:
        return replace(options, num_replicas=self.num_leaves, outer=self.outer.make, many_arrivals=True)

    def bind(self, model, group, calls, clock, tolerance=None, allowance=None) -> LiveFederated:
        if len(model.trained) > 1:
            raise UsageError(
                f"You gave run.replicate {len(model.trained)} optimizers under agree=Federated(...): a client steps "
                f"after each of its batches, and it could not tell which to step. Give it one, of all parameters."
            )
        if self.privacy is not None:
            # What counts may not be installed: the time to say so is before the first round.
            self.privacy.epsilon(1, self.rate)
        return LiveFederated(self, model, group, calls, clock, tolerance, allowance)


class LiveFederated(Live):
    """One worker's side of federated averaging."""

    sums_gradients = False
    recipe: Federated
    # Clients differ in work, so the time of some says little about their worker.
    can_move = False

    def __init__(self, *bound: Any):
        super().__init__(*bound)
        if self.allowance.skips:
            raise SettingsError(
                f"You set on_bad_sample={self.allowance.rule!r} under agree=Federated(...), where clients count by "
                f"samples that are all read. Leave bad samples out of the clients' data."
            )
        self._num_rounds = 0
        self._cohort = Cohort(seed=0, number=-1, samples={}, lost=frozenset(), num_leaves=1)
        self._bad: list[list[int]] = []
        self._difference: Difference = []
        self.reseat()

    @property
    def leaves(self) -> range:
        """The leaves that this worker plays."""
        return self.model.trained[0].replicas

    def check_budget(self) -> None:
        """Check that there may be another round.

        Raises:
            BudgetError: the privacy budget is spent.
        """
        if self.recipe.privacy is not None:
            self.recipe.privacy.check(self._num_rounds + 1, self.recipe.rate)

    def begin_round(self, cohort: Cohort) -> None:
        """Take the clients of the round that the next pass plays."""
        self._cohort = cohort

    def begin_pass(self) -> None:
        self._guest.leave()
        self.model.trained[0].gradients.begin_pass()
        self.model.buffers.begin_pass()
        self._pool.begin(self._cohort)
        self._bad = []

    def begin_shard(self, index: int, replica: int) -> None:
        self.model.trained[0].gradients.begin_shard(index)
        if replica in self._cohort.client_of:
            self._guest.enter()

    def end_batch(self) -> None:
        """Let the client that is played make its step."""
        self._guest.step()

    def leave_shard(self) -> None:
        self._difference = self._guest.difference()
        self._guest.leave()

    def end_shard(self, replica: int) -> None:
        client = self._cohort.client_of.get(replica)
        if client is not None:
            factor, bad = _factor_of(self.recipe, replica, self._difference)
            self._bad += bad
            self._pool.add(replica, client, self._difference, factor)
            self._difference = []
        self.model.trained[0].gradients.end_shard()

    def update(self, request: Request, part: Part) -> Outcome:
        trained, integrity, recipe = self.model.trained[0], self.model.integrity, self.recipe
        _check(recipe, request, trained)
        if self.group.worker.is_first and integrity.is_due:
            self.calls.ask(Wish.VERIFY)
        presence = trained.gradients.presence()
        terms = terms_of(request, trained.optimizer, self.tolerance, self.allowance, self.group.worker.size == 1)
        met = Meeting.hold(self.calls, request, part, terms, self._bad, presence or b"")
        self.clock.to("update")
        when = f"before the update of step {request.seeds[1]}"
        if not integrity.verify(self.calls, "step.update (verify)", when):
            self.model.guard.check()
        met.check(trained.optimizer, self.tolerance, self.allowance)
        if met.changed and not recipe.covers_buffers:
            raise UsageError(
                f"Buffers of the model (running statistics, most likely) changed while clients trained, under "
                f"agree={recipe!r}: they would be averaged in the clear, without bound, mask or noise. Use GroupNorm "
                f"or LayerNorm, or track_running_stats=False."
            )
        self._num_rounds += 1
        if not met.samples and recipe.privacy is None:
            # Nobody delivered. With privacy this must not be seen, and there is noise to add.
            self.model.buffers.restore()
            return met.outcome(None, skipped=True)
        losses = met.losses if recipe.expects_finite else []
        problem = problem_of(request, trained, losses, [one for found in met.own for one in found])
        if problem is not None:
            self.tolerance.check(request.optimizer, problem.words, problem.advice)
            self.model.buffers.restore()
        else:
            self._pool.meet()
            self.model.buffers.merge(met.samples, met.changed)
            _commit(self, self._pool, request, met)
        integrity.updated(self.calls.heard(Wish.VERIFY) or self.calls.stands(Wish.SNAPSHOT))
        return met.outcome(None, problem is not None, problem.words if problem is not None else "")

    def state(self) -> tuple[dict[str, torch.Tensor], Any]:
        return {}, {"rounds": self._num_rounds}

    def load(self, tensors: Mapping[str, torch.Tensor], values: Any) -> None:
        # What was told of clients stays told: weights of an earlier round give no budget back.
        self._num_rounds = max(self._num_rounds, values["rounds"] if values is not None else 0)

    def take_over(self, values: Any) -> None:
        self._num_rounds = values["rounds"]

    def facts(self) -> dict[str, Any]:
        found = {"agreement": repr(self.recipe), "rounds": self._num_rounds, "clients": self.recipe.num_clients}
        privacy = self.recipe.privacy
        if privacy is not None:
            epsilon = privacy.epsilon(self._num_rounds, self.recipe.rate)
            found["privacy"] = f"epsilon {epsilon:.4g} at delta {privacy.delta:g}, for one client's whole data"
        return found

    def reseat(self) -> None:
        # Room for a client, and where updates come together, in the group as it is now.
        recipe, trained = self.recipe, self.model.trained[0]
        self._guest = Guest(trained, recipe.proximal)
        pool: Pool = Tree(trained)
        if recipe.secure is not None:
            pool = Words(trained, self.group, recipe.secure)
        elif recipe.aggregate.needs_all:
            pool = Rows(trained, self.group, recipe.num_leaves, recipe.aggregate)
        if recipe.privacy is not None:
            pool = Noisy(pool, trained, self.group.worker.rank, recipe.privacy)
        self._pool = pool


def _factor_of(recipe: Federated, leaf: int, update: Difference) -> tuple[float, list[list[int]]]:
    """Return what a client's update is multiplied by, and what is wrong with it: see `meeting.problem_of`."""
    known = [(index, flat) for index, flat in enumerate(update) if flat is not None]
    if not recipe.expects_finite:
        prepare = recipe.privacy or recipe.aggregate
        return prepare.prepare([flat for _, flat in known]), []
    sizes = torch._foreach_norm([flat for _, flat in known])
    if math.isfinite(sum(float(size) for size in sizes)):
        return 1.0, []
    bad = [index for index, flat in known if not bool(torch.isfinite(flat).all())]
    return (0.0, [[leaf, bad[0], bad[-1], len(bad)]]) if bad else (1.0, [])


def _commit(live: LiveFederated, pool: Pool, request: Request, met: Meeting) -> None:
    """Let owners update their parts of the weights. Collective."""
    trained = live.model.trained[0]
    live.model.guard.open()
    trained.update.apply(pool, absent_of(met.frames, trained), 1.0)
    trained.weights.share(live.group)
    notice = trained.update.notice()
    frame = b"" if notice is None else wire.pack(notice)
    told = live.calls.meet("step.update (commit)", request.where, None, frame)
    live.clock.to("update")
    trained.update.settle([wire.unpack(frame) if frame else None for _, frame in told])
    live.model.guard.accept_update()


def _check(recipe: Federated, request: Request, trained: Trained) -> None:
    """Refuse what clients that step by themselves cannot do.

    Raises:
        UsageError: clipping or a transform after the fact; or what `check_apart` says.
    """
    check_apart(recipe, request, trained)
    if request.clip_norm is not None or request.transform is not None:
        raise UsageError(
            f"You gave step.update clip_norm or transform at {request.where} under agree=Federated(...): the clients "
            f"have stepped by then. Change their gradients in the loop, after step.backward(loss): "
            f"torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)."
        )
