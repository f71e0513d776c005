"""Plain values to bytes and back, without pickle: what crosses between workers, and what checkpoints hold.

A frame is: 8 bytes length of the JSON part (little endian), the JSON part, then the bytes of every tensor, each
starting on a multiple of 64. JSON numbers keep every bit of an int and of a finite float; NaN and infinities are
written as Python's json does.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch

_ALIGNMENT = 64
_MARK = "$"
_MARK_TEXT = b'"$"'
_encode = json.JSONEncoder(separators=(",", ":")).encode
_decode = json.JSONDecoder().raw_decode


def pack(value: Any) -> bytes:
    """Return `value` as bytes.

    Args:
        value: None, bool, int, float, str, bytes, torch.Tensor, numpy array or scalar, or lists, tuples and dicts
            (with str or int keys) of these.

    Raises:
        TypeError: it holds something else; the message names where.
    """
    blobs: list[torch.Tensor] = []
    text = _encode(to_json(value, blobs, "value")).encode()
    out = bytearray(len(text).to_bytes(8, "little") + text)
    for blob in blobs:
        out += bytes(-len(out) % _ALIGNMENT)
        out += bytes_of(blob)
    return bytes(out)


def unpack(frame: bytes) -> Any:
    """Return the value that `pack` wrote. Tensors own their memory.

    Raises:
        ValueError: the frame is not one that `pack` wrote.
    """
    view = memoryview(frame)
    try:
        size = int.from_bytes(view[:8], "little")
        end = 8 + size
        text = bytes(view[8:end])
        # A replay reads thousands of these: straight from the decoder, and plain values as they are.
        tree, length = _decode(text.decode("ascii"))
        if length != size:
            raise ValueError(f"A frame of {size} bytes holds a value of {length}.")
        if _MARK_TEXT not in text:
            return tree
        return _from_tree(tree, view, [end])
    except (IndexError, KeyError, TypeError, RuntimeError, RecursionError) as error:
        raise ValueError(f"This is not a samestep frame: {error}") from error


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of `tensor` in row-major order (a copy where it is not contiguous, or not on the CPU)."""
    dense = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    flat = dense.as_strided((dense.numel(),), (1,))
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")


def dtype_named(name: str) -> torch.dtype:
    """Return the torch dtype called `name` ("float32").

    Raises:
        ValueError: there is none.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"No torch dtype is called {name!r}.")
    return dtype


def name_of(dtype: torch.dtype) -> str:
    """Return the short name of a dtype, "float32"."""
    return str(dtype).removeprefix("torch.")


def to_json(value: Any, blobs: list[torch.Tensor], where: str) -> Any:
    """Return `value` as JSON-ready values; tensors are appended to `blobs` and replaced by a description."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | float) and type(value) in (int, float):
        return value
    if isinstance(value, torch.Tensor):
        blobs.append(value)
        return {_MARK: "tensor", "dtype": name_of(value.dtype), "shape": list(value.shape)}
    if isinstance(value, np.generic):
        return to_json(value.item(), blobs, where)
    if isinstance(value, np.ndarray) and value.dtype != object:
        blobs.append(torch.from_numpy(np.ascontiguousarray(value)))
        return {_MARK: "array", "dtype": name_of(blobs[-1].dtype), "shape": list(value.shape)}
    if isinstance(value, bytes | bytearray):
        blobs.append(torch.frombuffer(bytearray(value), dtype=torch.uint8) if value else torch.empty(0).byte())
        return {_MARK: "bytes", "dtype": "uint8", "shape": [len(value)]}
    if isinstance(value, list):
        return [to_json(v, blobs, f"{where}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, tuple):
        return {_MARK: "tuple", "items": [to_json(v, blobs, f"{where}[{i}]") for i, v in enumerate(value)]}
    if isinstance(value, dict):
        if all(type(k) is str for k in value) and _MARK not in value:
            return {k: to_json(v, blobs, f"{where}[{k!r}]") for k, v in value.items()}
        pairs = [[to_json(k, blobs, where), to_json(v, blobs, f"{where}[{k!r}]")] for k, v in value.items()]
        return {_MARK: "dict", "items": pairs}
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    raise TypeError(
        f"{where} is a {type(value).__name__}; only None, numbers, text, bytes, tensors, arrays, and lists, tuples "
        f"and dicts of these can be recorded or sent between workers."
    )


def _from_tree(tree: Any, frame: memoryview, cursor: list[int]) -> Any:
    if isinstance(tree, list):
        return [_from_tree(v, frame, cursor) for v in tree]
    if not isinstance(tree, dict):
        return tree
    kind = tree.get(_MARK)
    if kind is None:
        return {k: _from_tree(v, frame, cursor) for k, v in tree.items()}
    if kind == "tuple":
        return tuple(_from_tree(v, frame, cursor) for v in tree["items"])
    if kind == "dict":
        return {_hashable(_from_tree(k, frame, cursor)): _from_tree(v, frame, cursor) for k, v in tree["items"]}
    tensor = _next_tensor(tree, frame, cursor)
    if kind == "tensor":
        return tensor
    return tensor.numpy() if kind == "array" else tensor.numpy().tobytes()


def _hashable(key: Any) -> Any:
    return tuple(key) if isinstance(key, list) else key


def _next_tensor(tree: dict, frame: memoryview, cursor: list[int]) -> torch.Tensor:
    dtype, shape = dtype_named(tree["dtype"]), tree["shape"]
    if any(type(d) is not int or d < 0 for d in shape):
        raise ValueError(f"A tensor's shape is {shape}.")
    num_bytes = dtype.itemsize
    for size in shape:
        num_bytes *= size
    start = cursor[0] + -cursor[0] % _ALIGNMENT
    cursor[0] = start + num_bytes
    if num_bytes == 0:
        return torch.empty(shape, dtype=dtype)
    if cursor[0] > len(frame):
        raise ValueError(f"A tensor of {num_bytes} bytes is cut off.")
    return torch.frombuffer(bytearray(frame[start : cursor[0]]), dtype=torch.uint8).view(dtype).reshape(shape)
