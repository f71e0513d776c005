"""A run's state to a checkpoint and back: weights, optimizer state, whatever else is registered, and the ledger."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch

from samestep.agree.agreement import Live
from samestep.core.group import Group
from samestep.core.model import Model
from samestep.core.snapshot import Snapshots
from samestep.errors import CheckpointError, MismatchError, SettingsError, StorageError
from samestep.storage import checkpoint, wire

_AGREED = "agreed."
"""Begins the names of tensors that the way to agree keeps."""

_REPLICA = "replica."
"""Begins the names of tensors that the script keeps of each replica."""

_States = tuple[list[Any], tuple[dict[str, torch.Tensor], Any], dict[str, torch.Tensor]]
"""State of each optimizer, what the way to agree keeps, and what the script keeps of each replica."""


class Archive:
    """Saves and restores what was replicated."""

    def __init__(self, model: Model, group: Group, agreed: Live):
        self._model = model
        self._group = group
        self._agreed = agreed

    def prepare(self, folder: str) -> None:
        """See that checkpoints can be written to a folder, before hours depend on it. Collective.

        Raises:
            SettingsError: they cannot.
        """
        error = self._first(lambda: checkpoint.prepare(folder))
        if error is not None:
            raise SettingsError(f"You set checkpoint={folder!r}. {error} Or name another folder.")

    def save(self, folder: str, step: int, facts: dict[str, Any], keep: int | None) -> StorageError | None:
        """Write a checkpoint. Collective; the first worker writes.

        Args:
            folder: the run's folder.
            step: committed steps.
            facts: what else the run needs to go on.
            keep: how many checkpoints to keep there, or None for all.

        Returns:
            None, or why old checkpoints could not be deleted.

        Raises:
            StorageError: the disk did not take it.
            CheckpointError: it holds what cannot be written, or another run's checkpoint is in its place.
        """
        states = self._states()
        # The exchange also keeps the others from changing the weights while they are written.
        error = self._first(lambda: self._write(folder, step, facts, states))
        if error is not None:
            raise error
        if keep is None:
            return None
        trouble = self._first(lambda: checkpoint.keep(folder, keep, trusted=checkpoint.path_of(folder, step)))
        if trouble is not None and not isinstance(trouble, StorageError):
            raise trouble
        return trouble

    def snapshot(self, snapshots: Snapshots, step: int, facts: dict[str, Any]) -> None:
        """Keep the state in memory. Collective; the first worker writes.

        The others need not wait for it: none can update weights before the first comes to the next update.
        """
        states = self._states()
        if self._group.worker.is_first:
            weights, state, model = self._contents(states)
            snapshots.write(step, weights, state, {**facts, "model": model})

    def restore(self, saved: checkpoint.Checkpoint, any_agreement: bool = False) -> None:
        """Set everything that is registered to what `saved` holds. Collective.

        Args:
            saved: the state.
            any_agreement: it may have been made under another way to agree, which then starts from its weights.

        Raises:
            MismatchError: it holds another model, or was made under another way to agree.
        """
        self._check(saved)
        recipe, mine = saved.facts["model"]["agreed"]["recipe"], repr(self._agreed.recipe)
        if recipe != mine and not any_agreement:
            raise MismatchError(
                f"The checkpoint {saved.path} was made with agree={recipe}, and you set agree={mine}. Set it as it "
                f"was, or start a new run from its weights: run.load({str(saved.path)!r})."
            )
        with self._agreed.drained():
            self._restore(saved, recipe == mine, any_agreement)

    def _restore(self, saved: checkpoint.Checkpoint, same_recipe: bool, any_agreement: bool) -> None:
        writes = self._group.worker.is_first or not self._group.shares_memory
        self._group.exchange(b"")
        self._model.guard.open()
        facts = saved.facts["model"]
        targets = self._tensors()
        for name, tensor in (*saved.weights.items(), *saved.state.items()):
            target = targets.get(name)
            if target is not None and (writes or not self._is_shared(target)):
                with torch.no_grad():
                    target.copy_(tensor)
        for number, trained in enumerate(self._model.trained):
            self._restore_optimizer(trained, facts["optimizers"][number], saved.state, f"optimizer.{number}.")
        kept = {n.removeprefix(_AGREED): t for n, t in saved.state.items() if n.startswith(_AGREED)}
        load = self._agreed.adopt if any_agreement else self._agreed.load
        load(*((kept, facts["agreed"]["values"]) if same_recipe else ({}, None)))
        of_replicas = {n.removeprefix(_REPLICA): t for n, t in saved.state.items() if n.startswith(_REPLICA)}
        for state in self._model.states:
            state.load(of_replicas)
        self._set_others(facts)
        self._group.exchange(b"")
        self._model.guard.accept()

    def take_over(self, saved: checkpoint.Checkpoint) -> None:
        """Set what every worker has of its own to what `saved` holds; the rest lies in the group's memory already."""
        facts = saved.facts["model"]
        targets = self._tensors()
        with torch.no_grad():
            for name, tensor in (*saved.weights.items(), *saved.state.items()):
                target = targets.get(name)
                if target is not None and not self._is_shared(target):
                    target.copy_(tensor)
        for trained, kept in zip(self._model.trained, facts["optimizers"], strict=True):
            trained.take_over(kept["groups"], {int(i): numbers for i, numbers in kept["numbers"].items()})
        self._agreed.take_over(facts["agreed"]["values"])
        self._set_others(facts)
        self._model.guard.accept()

    def _set_others(self, facts: Mapping[str, Any]) -> None:
        for other, state in zip(self._model.others, facts["others"], strict=True):
            other.load_state_dict(state)
        for prefix, module in self._model.modules:
            for path, extra in facts["extras"].get(prefix, {}).items():
                module.get_submodule(path).set_extra_state(extra)
        self._group.exchange(b"")
        self._model.guard.accept()
        self._model.integrity.watch()

    def _states(self) -> _States:
        """Return what workers must gather before the first writes. Collective."""
        optimizers = [trained.update.full_state() for trained in self._model.trained]
        kept = {name: tensor for state in self._model.states for name, tensor in state.tensors().items()}
        return optimizers, self._agreed.state(), kept

    def _first(self, act: Callable[[], Any]) -> CheckpointError | None:
        """Let the first worker act; return on every worker the error that this ended with. Collective."""
        told = []
        if self._group.worker.is_first:
            try:
                act()
            except StorageError as error:
                told = [str(error), error.reason]
            except (CheckpointError, TypeError) as error:
                told = [str(error)]
        told = json.loads(self._group.exchange(json.dumps(told).encode())[0])
        if not told:
            return None
        return StorageError(*told) if len(told) == 2 else CheckpointError(*told)

    def _write(self, folder: str, step: int, facts: dict[str, Any], states: _States) -> None:
        weights, state, model = self._contents(states)
        checkpoint.write(folder, step=step, weights=weights, state=state, facts={**facts, "model": model})

    def _contents(self, states: _States) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]:
        """Return the weights, the other tensors, and plain values of all that is registered."""
        weights, state = {}, {}
        extras: dict[str, dict[str, Any]] = {}
        for prefix, module in self._model.modules:
            for name, value in module.state_dict().items():
                if isinstance(value, torch.Tensor):
                    weights[prefix + name] = value
                else:
                    extras.setdefault(prefix, {})[name.removesuffix("_extra_state").removesuffix(".")] = value
        for name, tensor in self._model.named_tensors():
            if name not in weights:
                state[name] = tensor
        optimizers = []
        for number, (trained, full) in enumerate(zip(self._model.trained, states[0], strict=True)):
            numbers: dict[int, dict[str, Any]] = {}
            for index, values in full.items():
                numbers[index] = {}
                for key, value in values.items():
                    if isinstance(value, torch.Tensor):
                        state[f"optimizer.{number}.{index}.{key}"] = value
                    else:
                        numbers[index][key] = value
            groups = [{k: v for k, v in g.items() if k != "params"} for g in trained.optimizer.param_groups]
            facts = {"name": type(trained.optimizer).__name__, "outer": trained.has_outer}
            optimizers.append({"numbers": numbers, "groups": groups, **facts})
        others = [_portable(other.state_dict()) for other in self._model.others]
        kept, values = states[1]
        state.update({_AGREED + name: tensor for name, tensor in kept.items()})
        state.update({_REPLICA + name: tensor for name, tensor in states[2].items()})
        model = {
            "optimizers": optimizers,
            "others": others,
            "extras": extras,
            "agreed": {"recipe": repr(self._agreed.recipe), "values": values},
        }
        return weights, state, model

    def _tensors(self) -> dict[str, torch.Tensor]:
        named = dict(self._model.named_tensors())
        for prefix, module in self._model.modules:
            for name, value in module.state_dict(keep_vars=True).items():
                if isinstance(value, torch.Tensor):
                    named[prefix + name] = value
        return named

    def _is_shared(self, tensor: torch.Tensor) -> bool:
        return isinstance(tensor, torch.nn.Parameter) and self._model.holds(tensor)

    def _check(self, saved: checkpoint.Checkpoint) -> None:
        """Compare names, shapes and dtypes, and the optimizers, with the model at hand."""
        here = self._tensors()
        there = {
            n: t
            for n, t in {**saved.state, **saved.weights}.items()
            if not n.startswith(("optimizer.", _AGREED, _REPLICA))
        }
        there |= {n: t for n, t in saved.state.items() if n in here}
        for name in [*here, *there]:
            mine, theirs = _shown(here.get(name)), _shown(there.get(name))
            if mine != theirs:
                raise MismatchError(
                    f"The checkpoint {saved.path} is of another model: {name!r} is {theirs} there and {mine} here. "
                    f"Build the same model, or start anew in another folder."
                )
        names = [o["name"] for o in saved.facts["model"]["optimizers"]]
        mine_names = [type(t.optimizer).__name__ for t in self._model.trained]
        if names != mine_names or len(saved.facts["model"]["others"]) != len(self._model.others):
            raise MismatchError(
                f"The checkpoint {saved.path} was made with optimizers {names} and "
                f"{len(saved.facts['model']['others'])} other registered objects; here are {mine_names} and "
                f"{len(self._model.others)}. Give run.replicate the same things in the same order."
            )

    def _restore_optimizer(self, trained: Any, facts: dict, state: Mapping[str, torch.Tensor], prefix: str) -> None:
        full: dict[int, dict[str, Any]] = {int(i): dict(numbers) for i, numbers in facts["numbers"].items()}
        for name, tensor in state.items():
            if name.startswith(prefix):
                index, _, key = name.removeprefix(prefix).partition(".")
                full.setdefault(int(index), {})[key] = tensor
        for group, settings in zip(trained.optimizer.param_groups, facts["groups"], strict=True):
            group.update(settings)
        # One way to agree keeps the state of the user's optimizer there, another that of its own: no use to each other.
        is_alike = facts.get("outer", trained.has_outer) == trained.has_outer
        trained.update.load(full if is_alike else {})


def _portable(state: Any) -> Any:
    """Return `state` if it can be written without pickle.

    Raises:
        CheckpointError: it cannot; says what is in it.
    """
    try:
        wire.pack(state)
    except TypeError as error:
        raise CheckpointError(f"A registered object's state cannot be saved: {error}") from error
    return state


def _shown(tensor: torch.Tensor | None) -> str:
    if tensor is None:
        return "absent"
    return f"{wire.name_of(tensor.dtype)}{list(tensor.shape)}"
