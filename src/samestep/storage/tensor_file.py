"""A checkpoint's tensors as a safetensors file, written piece by piece and verified against the manifest when read."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch

from samestep.errors import CheckpointError
from samestep.storage import wire
from samestep.storage.checkpoint_file import MAX_JSON_BYTES, bytes_digest, new_file, opened
from samestep.storage.digest import TensorHasher, joined_digest, pieces

_PIECE_BYTES = 4 << 20
_ALIGNMENT = 64

Tensors: TypeAlias = Mapping[str, torch.Tensor]

# fmt: off
_CODES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}
# fmt: on
"""What every reader of safetensors knows. Other dtypes are stored as their bytes: U8 with one more dimension."""


class Entry(NamedTuple):
    """One tensor, by the manifest."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    digest: str
    same_as: str | None

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(path: Path, tensors: Tensors) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write a safetensors file, piece by piece; return the manifest's entries of its tensors and of the file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))  # so each starts on its item size
    end = 0
    for name in order:
        code, shape = _stored(tensors[name].dtype, tuple(tensors[name].shape))
        begin, end = end, end + tensors[name].numel() * tensors[name].itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    start = len(text).to_bytes(8, "little") + text
    digests: dict[str, str] = {}
    with new_file(path) as write:
        write(start)
        for name in order:
            tensor = tensors[name]
            hasher = TensorHasher(tensor.dtype, tensor.shape)
            try:
                for piece in pieces(tensor):
                    hasher.update(piece)
                    write(piece)
            except TypeError as error:
                raise CheckpointError(f"The tensor {name!r} cannot be checkpointed. {error}") from error
            digests[name] = hasher.digest()
    entries = {
        name: {"dtype": wire.name_of(tensor.dtype), "shape": list(tensor.shape), "digest": digests[name]}
        for name, tensor in tensors.items()
    }
    return entries, {"bytes": len(start) + end, "digest": _file_digest(start, digests.items())}


def is_plain(dtype: torch.dtype) -> bool:
    """Return whether every reader of safetensors knows `dtype`; if not, its bytes are stored."""
    return wire.name_of(dtype) in _CODES


def _stored(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """Return the safetensors dtype and shape under which a tensor is stored."""
    code = _CODES.get(wire.name_of(dtype))
    return (code, shape) if code else ("U8", (*shape, dtype.itemsize))


def _file_digest(start: bytes, digests: Iterable[tuple[str, str]]) -> str:
    """Return a digest of a whole tensor file without reading its tensors twice: its header, then their digests."""
    return joined_digest([("header", bytes_digest(start)), *digests])


def read_tensors(
    path: Path, entries: dict[str, Entry], expected: tuple[int, str], keep_values: bool
) -> dict[str, torch.Tensor]:
    """Verify a tensor file against the manifest and return its tensors (none unless `keep_values`)."""
    num_bytes, digest = expected
    stored = {name: entry for name, entry in entries.items() if entry.same_as is None}
    tensors = {}
    with opened(path, num_bytes) as (file, size):
        if size != num_bytes:
            raise ValueError(f"it has {size} bytes, not {num_bytes}")
        start, order = _read_header(file, stored, num_bytes)
        for name in order:
            memory, found = _read_tensor(file, stored[name], keep_values)
            if found != stored[name].digest:
                raise ValueError(f"the tensor {name!r} does not match its digest")
            if memory is not None:
                tensors[name] = memory
        if _file_digest(start, ((name, stored[name].digest) for name in order)) != digest:
            raise ValueError("its header does not match the manifest")
    return {name: tensors[entry.same_as or name] for name, entry in entries.items()} if keep_values else {}


def _read_header(file: io.BufferedReader, entries: dict[str, Entry], num_bytes: int) -> tuple[bytes, list[str]]:
    """Return the bytes before the tensors, and the names of the tensors in the order of the file."""
    length = int.from_bytes(file.read(8), "little")
    if length > min(MAX_JSON_BYTES, num_bytes - 8):
        raise ValueError(f"its header claims {length} bytes")
    text = file.read(length)
    header = json.loads(text)
    header.pop("__metadata__", None)
    if set(header) != set(entries):
        raise ValueError("it holds other tensors than the manifest says")
    end = 0
    for name in header:
        entry, item = entries[name], header[name]
        begin, end = end, end + entry.num_bytes
        if item["data_offsets"] != [begin, end]:
            raise ValueError(f"the tensor {name!r} does not lie where its shape says")
        if (item["dtype"], tuple(item["shape"])) != _stored(entry.dtype, entry.shape):
            raise ValueError(f"the tensor {name!r} has another dtype or shape than the manifest says")
    if 8 + length + end != num_bytes:
        raise ValueError("its tensors do not fill it")
    return length.to_bytes(8, "little") + text, list(header)


def _read_tensor(file: io.BufferedReader, entry: Entry, keep_value: bool) -> tuple[torch.Tensor | None, str]:
    """Read a tensor's bytes; return it, or None if not wanted, and the digest of what was read."""
    hasher = TensorHasher(entry.dtype, entry.shape)
    num_bytes = entry.num_bytes
    memory = torch.empty(num_bytes if keep_value else min(num_bytes, _PIECE_BYTES), dtype=torch.uint8)
    view = memory.numpy().data
    for begin in range(0, num_bytes, _PIECE_BYTES):
        size = min(_PIECE_BYTES, num_bytes - begin)
        piece = view[begin : begin + size] if keep_value else view[:size]
        if file.readinto(piece) != size:
            raise ValueError("it ends early")
        hasher.update(piece)
    return memory.view(entry.dtype).reshape(entry.shape) if keep_value else None, hasher.digest()
