"""What `run.replicate` was given, as one worker sees it: modules, optimizers, and all that belongs to them.

Trained   one optimizer: its weights, its gradients, how their sums are completed, how it is updated
Model     all of them, with frozen parameters, buffers, and whatever else has a state_dict
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from samestep.core import tree
from samestep.core.anyone_update import AnyoneUpdate
from samestep.core.buffers import Buffers, Rule
from samestep.core.division import Division
from samestep.core.element_update import ElementUpdate
from samestep.core.fold import Fold, HeldFold
from samestep.core.gradients import Gradients
from samestep.core.group import GradientArea, Group, Solo
from samestep.core.guard import Guard
from samestep.core.integrity import Integrity
from samestep.core.layout import GRANULE, PIECE, Layout, lay_out
from samestep.core.memory import check_fits, give_back
from samestep.core.optimizers import Kind, apart_copy, kind_of, settings_of
from samestep.core.per_replica import PerReplica
from samestep.core.places import Slot
from samestep.core.update import Update
from samestep.core.weights import Weights, check_separate, shape_of
from samestep.core.whole_update import WholeUpdate
from samestep.core.worker import Worker
from samestep.errors import MismatchError, UsageError
from samestep.storage import wire
from samestep.storage.digest import tensor_digest


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a model is replicated.

    Attributes:
        num_replicas: number of replicas.
        threads: intra-op threads of each worker.
        buffers: how buffers of replicas are merged (see `Buffers`).
        many_arrivals: fold every gradient at the end of its shard.
        read_only: between updates a write to the weights kills the worker, where the group can do that.
        verifies: whether memory is looked at for flipped bits.
        seed: of the run.
        outer: makes, of parameters, the optimizer that updates the weights instead of the user's.
        apart: replicas keep buffers of their own from step to step.
        all_update: where memory is not shared, every worker updates all weights, from all replicas' gradients.
        beside: updates are made beside the steps that follow. Where memory is shared every worker owns everything, so
            that any of them can make an update, alone; elsewhere owners make them, with settings that are their own.
    """

    num_replicas: int
    threads: int = 1
    buffers: Rule | Mapping[str, Rule] = "mean"
    many_arrivals: bool = False
    read_only: bool = False
    verifies: bool = True
    seed: int = 0
    outer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer] | None = None
    apart: bool = False
    all_update: bool = False
    beside: bool = False


class Trained:
    """One optimizer and its parameters.

    Attributes:
        optimizer: the user's.
        applied: the one that updates the weights; the user's too, unless the options name another.
        has_outer: whether they do, so that its state is not that of the user's.
        weights, gradients, sums, update: its mechanism; see their classes.
        replicas: those this worker plays (`Model.division`).
        nodes: for each worker, the nodes of the tree that it folds.
        num_nodes: for each worker, how many.
        area_bytes: gradient memory of all workers of the group.
    """

    def __init__(
        self, number: int, optimizer: torch.optim.Optimizer, names: Mapping[int, str], group: Group, options: Options
    ):
        """Take over `optimizer` and its parameters. Collective.

        Args:
            number: of the optimizer in the run.
            optimizer: its groups must be final.
            names: name of each parameter, by id.
            group: the workers.
            options: how to replicate.
        """
        self.optimizer = optimizer
        self._number = number
        self._group = group
        self._options = options
        self._anyone = options.beside and group.shares_memory
        parameters = list(dict.fromkeys(p for g in optimizer.param_groups for p in g["params"]))
        self._kind = kind_of(optimizer)
        self.applied = optimizer
        self.has_outer = options.outer is not None
        if options.outer is not None:
            self.applied = options.outer(parameters)
            self._kind = kind_of(self.applied)
        elif options.beside and not group.shares_memory:
            self.applied = apart_copy(optimizer)
        self._shapes = [shape_of(p, divisible=self._kind is Kind.ELEMENT) for p in parameters]
        parameter_names = [names[id(p)] for p in parameters]
        self.weights = Weights(group, parameter_names, parameters, self._layout(), f"weights {number}")
        self.area: GradientArea | None = None
        self._meet(Division.even(group.worker.size, options.num_replicas))
        made: type[ElementUpdate | WholeUpdate] = WholeUpdate
        if self._kind is Kind.ELEMENT:
            made = AnyoneUpdate if self._anyone else ElementUpdate
        self.update: Update = made(self.applied, self.weights, group, f"state {number}")
        self.stale = False
        self._held = [id(p) for group in optimizer.param_groups for p in group["params"]]
        self._load_hook = optimizer.register_load_state_dict_post_hook(self._loaded)
        self._guard_hook = optimizer.register_step_pre_hook(_refuse_step)

    def reseat(self, division: Division) -> None:
        """Divide the work among the workers that the group has now. Collective."""
        self.gradients.close()
        self.weights.reseat(self._group, self._layout())
        self._meet(division)
        self.update.reseat()

    def divide(self, division: Division) -> None:
        """Let each worker play other replicas; what it owns of weights and state stays its own. Collective."""
        self.gradients.close()
        # The room that they take goes before there is other room.
        del self.sums
        self.area = None
        self._meet(division)

    def take_over(self, groups: Sequence[Mapping[str, Any]], numbers: Mapping[int, Mapping[str, Any]]) -> None:
        """Take what the optimizer of a worker that joins has of its own: settings of groups, numbers in the state."""
        for group, settings in zip(self.optimizer.param_groups, groups, strict=True):
            group.update(settings)
        for index, values in numbers.items():
            self.optimizer.state[self.weights.parameters[index]].update(values)
        self.stale = False

    def _layout(self) -> Layout:
        # An optimizer that may look at anything has one owner: the layout for one worker, others own nothing.
        size = self._group.worker.size
        owners = 1 if self._kind is Kind.WHOLE else size
        granule = GRANULE if self._options.threads == 1 else PIECE
        if self._anyone:
            one = lay_out(self._shapes, 1, granule=granule)
            return replace(one, chunks=one.chunks * size, runs=one.runs * size, sum_runs=one.sum_runs * size)
        return _for_all(lay_out(self._shapes, owners, granule=granule), size)

    def _meet(self, division: Division) -> None:
        """Make the places where gradients are folded and meet. Collective."""
        rank, size, num_replicas = self._group.worker.rank, self._group.worker.size, division.num_replicas
        if size == 1:
            # Who updates alone adds the gradients of all replicas, whoever played them.
            division = Division.even(1, num_replicas)
        layout, runs = self.weights.layout, division.runs
        scripts = [tree.script_of(run, num_replicas) for run in runs]
        self.replicas = runs[rank]
        self.nodes = [s.nodes for s in scripts]
        self.num_nodes = [len(nodes) for nodes in self.nodes]
        self.area_bytes = sum(s.num_buffers for s in scripts) * layout.sum_bytes
        self.area = None
        if size > 1:
            nodes = [range(count) for count in self.num_nodes]
            name = f"gradients {self._number}"
            self.area = self._group.gradient_area(layout.sum_bytes, self.num_nodes, nodes, layout.sum_runs, name)
        self.gradients = Gradients(self.weights, scripts[rank], self.area, self._options.many_arrivals)
        if self.area is None:
            self.sums: Fold | HeldFold = HeldFold(layout.chunks[0], self.gradients.held)
        else:
            self.sums = Fold(self.weights, rank, self.area, tree.fold_order(runs, num_replicas))

    def _loaded(self, optimizer: torch.optim.Optimizer) -> None:
        self.stale = True

    @property
    def updates_alone(self) -> bool:
        """Whether this worker updates all weights, as every other one does."""
        return self._group.worker.size == 1

    def share(self) -> None:
        """Let every worker see what was updated."""
        self.weights.share(self._group)

    def release(self) -> None:
        """Take the hooks off. A gradient's hook and its parameter refer to each other out of the collector's sight."""
        self.gradients.close()
        self._guard_hook.remove()
        self._load_hook.remove()

    def reload_if_stale(self) -> None:
        """Take over a state that the user loaded into the optimizer. Collective if so (on every worker alike)."""
        held = [id(p) for group in self.optimizer.param_groups for p in group["params"]]
        if held != self._held:
            raise UsageError(
                f"Parameters of {type(self.optimizer).__name__} were changed after run.replicate. Give it all of them "
                f"before; those with requires_grad=False are skipped until you unfreeze them."
            )
        if self.stale or self.update.was_cleared():
            self.stale = False
            state = {
                i: dict(self.optimizer.state[p])
                for i, p in enumerate(self.weights.parameters)
                if self.optimizer.state.get(p)
            }
            self.update.load(state)

    @property
    def places(self) -> Mapping[Slot, torch.Tensor]:
        """Optimizer state, as far as it lies in the group's memory."""
        return self.update.places.found

    def state_bytes(self) -> int:
        """Return bytes of optimizer state tensors that this worker sees."""
        seen = (v for s in self.applied.state.values() for v in s.values() if isinstance(v, torch.Tensor))
        return sum(v.numel() * v.element_size() for v in seen)


def _refuse_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    raise UsageError(
        f"You called {type(optimizer).__name__}.step(), but the run updates the weights. "
        f"Call step.update() instead (step.update(optimizer) if there are several)."
    )


class Model:
    """Everything that was replicated.

    Attributes:
        seed: of the run.
        trained: one per optimizer.
        modules: (prefix of names, module), in the order given.
        others: schedulers, scalers and alike: registered for checkpoints only.
        division: which replicas each worker plays.
        buffers, guard, integrity: see their classes.
        states: what the script keeps of each replica.
    """

    def __init__(self, things: Sequence[Any], group: Group, options: Options):
        """Replicate `things`. Collective.

        Raises:
            UsageError: something in it cannot be replicated; named.
            MismatchError: workers built different models; names the first tensor that differs.
            SettingsError: there is too little memory.
        """
        self._group = group
        self._options = options
        self.seed = options.seed
        self.division = Division.even(group.worker.size, options.num_replicas)
        modules = [t for t in things if isinstance(t, torch.nn.Module)]
        optimizers = [t for t in things if isinstance(t, torch.optim.Optimizer)]
        self.others = [t for t in things if not isinstance(t, torch.nn.Module | torch.optim.Optimizer)]
        self.modules = [(f"{i}:" if len(modules) > 1 else "", m) for i, m in enumerate(modules)]
        _check_things(modules, optimizers, self.others)
        for module in modules:
            module.to(group.worker.device)
        names = self._names(optimizers)
        self._check_same(group)
        _check_same_optimizers(optimizers, group)
        # The memory of weights, gradients, and (for most optimizers) two state tensors as large as the weights.
        taken = {id(p): p for o in optimizers for g in o.param_groups for p in g["params"]}
        if group.worker.is_first and group.worker.device == "cpu":
            script = tree.script_of(self.division.of(0), options.num_replicas)
            factor = 3 + group.worker.size * script.num_buffers
            check_fits(sum(p.numel() * p.element_size() for p in taken.values()) * factor, "The training state")
        alone = options.all_update and not group.shares_memory
        updating = Solo(Worker(device=group.worker.device)) if alone else group
        self.trained = [Trained(i, o, names, updating, options) for i, o in enumerate(optimizers)]
        self._frozen = self._share_frozen(names, set(taken), group)
        self.buffers = Buffers(self.modules, group, options.num_replicas, options.buffers, apart=options.apart)
        self.states: list[PerReplica] = []
        self._weights = [t.weights for t in self.trained] + self._frozen
        self._held = {id(p) for w in self._weights for p in w.parameters}
        self.guard = self._watch()
        self.integrity = Integrity(self._weights, self.trained, self.guard, group, options.verifies)
        give_back()  # the tensors that the parameters were built in

    def reseat(self) -> None:
        """Divide the work evenly among the workers that the group has now. Collective.

        Weights and state stay where they are; workers that have joined the group find them there.
        """
        self.guard.open()
        self.division = Division.even(self._group.worker.size, self._options.num_replicas)
        for trained in self.trained:
            trained.reseat(self.division)
        for weights in self._frozen:
            weights.reseat(self._group, lay_out(weights.layout.shapes, self._group.worker.size))
        self.buffers.reseat(self.division)
        for state in self.states:
            state.reseat(self.division)
        self.guard = self._watch()
        self.integrity.reseat(self.guard)

    def divide(self, division: Division) -> None:
        """Let each worker play other replicas, between two steps; all else stays as it is. Collective.

        It moves neither weights nor state, so it works where memory is not shared, too.
        """
        self.division = division
        for trained in self.trained:
            trained.divide(division)
        self.buffers.reseat(division)
        for state in self.states:
            state.reseat(division)

    def gradient_bytes(self, division: Division) -> list[int]:
        """Return how much memory each worker would have to find for gradients with `division`.

        Where workers share memory, that is what all of them take.
        """
        scripts = [tree.script_of(run, division.num_replicas) for run in division.runs]
        layouts = [trained.weights.layout for trained in self.trained]
        one = sum(layout.sum_bytes for layout in layouts)
        if self._group.shares_memory:
            return [one * sum(script.num_buffers for script in scripts)] * len(scripts)
        # Its own sums, and its part of everybody's nodes.
        num_nodes = sum(len(script.nodes) for script in scripts)
        parts = [sum(len(layout.sum_runs[rank]) for layout in layouts) for rank in range(len(scripts))]
        return [one * script.num_buffers + part * num_nodes for script, part in zip(scripts, parts, strict=True)]

    def _watch(self) -> Guard:
        modules = [module for _, module in self.modules]
        protector = self._group if self._options.read_only else None
        return Guard(modules, self._weights, protector)

    def named_tensors(self) -> list[tuple[str, torch.Tensor]]:
        """Return all parameters and buffers of the modules, then parameters that only an optimizer holds."""
        named = [
            (prefix + name, tensor)
            for prefix, module in self.modules
            for name, tensor in (*module.named_parameters(), *module.named_buffers())
        ]
        seen = {id(tensor) for _, tensor in named}
        for trained in self.trained:
            pairs = zip(trained.weights.names, trained.weights.parameters, strict=True)
            named += [(name, p) for name, p in pairs if id(p) not in seen]
        return named

    def holds(self, parameter: torch.Tensor) -> bool:
        """Return whether `parameter` lies in the group's memory."""
        return id(parameter) in self._held

    def detach(self) -> None:
        """Point every shared parameter at a copy of its own; see `attach`."""
        for weights in self._weights:
            for parameter in weights.parameters:
                parameter.data = parameter.data.clone()

    def attach(self, write: bool) -> None:
        """Point every shared parameter at its place again; where it pointed elsewhere, take its values if `write`."""
        for weights in self._weights:
            for parameter, view in zip(weights.parameters, weights.views, strict=True):
                if parameter.data_ptr() != view.data_ptr():
                    if write:
                        view.copy_(parameter.data)
                    parameter.data = view.detach()

    def release(self) -> None:
        """Take all hooks off; modules and optimizers are the user's alone again."""
        self.guard.open()
        for trained in self.trained:
            trained.release()

    def share_weights(self) -> None:
        """Give every worker the first worker's weights. Collective."""
        whole = self._group.worker.size - 1
        for weights in self._weights:
            num_bytes = weights.memory.numel()
            self._group.share(weights.memory, [range(num_bytes), *[range(num_bytes, num_bytes)] * whole])

    def state_bytes(self) -> int:
        """Return bytes of the training state on all workers of the group: weights, gradients, optimizer state."""
        weights = sum(w.memory.numel() for w in self._weights)
        return weights + sum(t.area_bytes + t.state_bytes() for t in self.trained)

    def _names(self, optimizers: Sequence[torch.optim.Optimizer]) -> dict[int, str]:
        names = {id(p): prefix + n for prefix, module in self.modules for n, p in module.named_parameters()}
        for number, optimizer in enumerate(optimizers):
            for index, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
                names.setdefault(id(p), f"optimizer {number} parameter {index}")
        everything = {id(p): p for o in optimizers for g in o.param_groups for p in g["params"]}
        for _, module in self.modules:
            everything.update({id(p): p for p in module.parameters()})
        check_separate([names[key] for key in everything], list(everything.values()))
        return names

    def _check_same(self, group: Group) -> None:
        """Compare all tensors with the first worker's."""
        mine = [
            [prefix + name, wire.name_of(t.dtype), list(t.shape), tensor_digest(t)]
            for prefix, module in self.modules
            for name, t in (*module.named_parameters(), *module.named_buffers())
        ]
        first = wire.unpack(group.exchange(wire.pack(mine))[0])
        for ours, theirs in zip(mine, first, strict=False):
            if ours != theirs:
                what = "values" if ours[:3] == theirs[:3] else f"{ours[1]}{ours[2]} against {theirs[1]}{theirs[2]}"
                raise MismatchError(
                    f"Worker {group.worker.rank} built another model than worker 0: the first tensor that differs is "
                    f"{ours[0]!r} ({what}). Build the model inside main without clocks, own generators or "
                    f"run.worker; the global generators are seeded alike on every worker."
                )
        if len(mine) != len(first):
            raise MismatchError(
                f"Worker {group.worker.rank} built a model of {len(mine)} tensors, worker 0 one of {len(first)}."
            )

    def _share_frozen(self, names: Mapping[int, str], taken: set[int], group: Group) -> list[Weights]:
        """Share the parameters that no optimizer holds, in modules of which one holds others."""
        frozen: dict[int, torch.nn.Parameter] = {}
        for _, module in self.modules:
            own = {id(p): p for p in module.parameters()}
            if own.keys() & taken:
                frozen.update({key: p for key, p in own.items() if key not in taken})
        if not frozen:
            return []
        layout = lay_out([shape_of(p, divisible=False) for p in frozen.values()], group.worker.size)
        return [Weights(group, [names[key] for key in frozen], list(frozen.values()), layout, "frozen")]


def _check_things(modules: Sequence[Any], optimizers: Sequence[Any], others: Sequence[Any]) -> None:
    for thing in others:
        if not (hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict")):
            raise UsageError(
                f"run.replicate was given a {type(thing).__name__}, which has no state_dict and load_state_dict. "
                f"Give it modules, optimizers, schedulers, and what else has both."
            )
    if not optimizers:
        raise UsageError("run.replicate needs at least one optimizer: run.replicate(model, optimizer).")
    owners: dict[int, int] = {}
    for number, optimizer in enumerate(optimizers):
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            if owners.setdefault(id(p), number) != number:
                raise UsageError("Two optimizers hold the same parameter. Give each its own.")
    for module in modules:
        for name, part in module.named_modules():
            if isinstance(part, torch.nn.SyncBatchNorm):
                raise UsageError(
                    f"{name!r} is a SyncBatchNorm, which talks to other workers by itself, in every shard: results "
                    f"would depend on the workers. Use BatchNorm (over a shard; its statistics are merged over "
                    f"replicas), or GroupNorm."
                )
            if isinstance(part, torch.nn.Embedding | torch.nn.EmbeddingBag) and part.max_norm is not None:
                raise UsageError(
                    f"The Embedding {name!r} has max_norm={part.max_norm}, with which it edits its weights in every "
                    f"forward, once per shard and worker. Leave max_norm out; after step.update() scale long rows "
                    f"inside `with run.edit():`."
                )
        for name, p in (*module.named_parameters(), *module.named_buffers()):
            if isinstance(p, torch.nn.UninitializedParameter | torch.nn.UninitializedBuffer):
                raise UsageError(f"{name!r} has no shape yet. Run the model once on a sample before run.replicate.")


def _check_same_optimizers(optimizers: Sequence[torch.optim.Optimizer], group: Group) -> None:
    mine = [
        f"{type(o).__name__} of {[len(g['params']) for g in o.param_groups]} parameters with {settings_of(o)}"
        for o in optimizers
    ]
    first = wire.unpack(group.exchange(wire.pack(mine))[0])
    if mine != first:
        raise MismatchError(
            f"Worker {group.worker.rank} built other optimizers than worker 0: {mine} against {first}. "
            f"Build them inside main without clocks, own generators or run.worker."
        )


def _for_all(layout: Layout, num_workers: int) -> Layout:
    """Return `layout` with empty runs for workers that own nothing."""
    missing = num_workers - len(layout.runs)
    if not missing:
        return layout
    nothing = range(layout.num_bytes, layout.num_bytes)
    no_sums = range(layout.sum_bytes, layout.sum_bytes)
    return replace(
        layout,
        chunks=layout.chunks + ((),) * missing,
        runs=layout.runs + (nothing,) * missing,
        sum_runs=layout.sum_runs + (no_sums,) * missing,
    )
