"""Batches as trees of tensors: walk them, index them, and give each tensor memory of its own that is aligned."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import numpy as np
import torch

ALIGNMENT = 64
"""Bytes. Math libraries take other paths, with other last bits, for operands that start elsewhere."""


def map_leaves(tree: Any, kind: type | tuple[type, ...], change: Callable[[Any], Any]) -> Any:
    """Return `tree` with `change` applied to every leaf of `kind`.

    Walks mappings, lists, tuples, named tuples and dataclasses. What holds nothing that changed is returned as it
    is, never copied.
    """
    if isinstance(tree, kind):
        return change(tree)
    if isinstance(tree, Mapping):
        return _with_values(tree, {key: map_leaves(value, kind, change) for key, value in tree.items()})
    if isinstance(tree, list | tuple):
        items = [map_leaves(value, kind, change) for value in tree]
        if all(new is old for new, old in zip(items, tree, strict=True)):
            return tree
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return _with_fields(tree, kind, change)
    return tree


def leaves_of(tree: Any, kind: type | tuple[type, ...]) -> list[Any]:
    """Return every leaf of `kind` in `tree`, in order."""
    leaves: list[Any] = []

    def keep(leaf: Any) -> Any:
        leaves.append(leaf)
        return leaf

    map_leaves(tree, kind, keep)
    return leaves


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor` where it owns its memory and starts on `ALIGNMENT`, else a copy that does.

    Only the CPU's dense tensors are looked at. A copy keeps the strides of a tensor without holes or overlaps.
    """
    if not is_dense(tensor):
        return tensor
    storage = tensor.untyped_storage()
    owns = tensor.storage_offset() == 0 and storage.nbytes() == tensor.numel() * tensor.itemsize
    if owns and tensor.data_ptr() % ALIGNMENT == 0:
        return tensor
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def is_dense(tensor: torch.Tensor) -> bool:
    """Return whether `tensor` is strided memory on the CPU."""
    return tensor.device.type == "cpu" and tensor.layout is torch.strided and not tensor.is_nested


def rows_of(column: torch.Tensor | np.ndarray, ids: np.ndarray) -> torch.Tensor:
    """Return rows `ids` (int64, within bounds) of a column as a tensor that owns aligned memory."""
    if isinstance(column, torch.Tensor):
        return column.index_select(0, torch.tensor(ids, device=column.device))
    out = torch.empty((ids.size, *column.shape[1:]), dtype=torch_dtype_of(column))
    # Written straight into torch's memory: NumPy aligns to 16 bytes only. mode="raise" would buffer `out`.
    np.take(column, ids, axis=0, out=out.numpy(), mode="clip")
    return out


def torch_dtype_of(array: np.ndarray) -> torch.dtype:
    """Return the torch dtype of an array's elements.

    Raises:
        TypeError, ValueError: torch has none.
    """
    return torch.from_numpy(np.empty(0, dtype=array.dtype)).dtype


def _with_values(tree: Mapping, values: dict) -> Mapping:
    if all(values[key] is value for key, value in tree.items()):
        return tree
    if not isinstance(tree, MutableMapping):
        return values
    changed = copy.copy(tree)
    changed.update(values)
    return changed


def _with_fields(tree: Any, kind: type | tuple[type, ...], change: Callable[[Any], Any]) -> Any:
    changed = tree
    for field in dataclasses.fields(tree):
        old = getattr(tree, field.name, None)
        new = map_leaves(old, kind, change)
        if new is not old:
            changed = copy.copy(tree) if changed is tree else changed
            object.__setattr__(changed, field.name, new)
    return changed
