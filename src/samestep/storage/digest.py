"""Digests: short names for exact bits. Two tensors with the same digest hold the same values, to the last bit.

A digest is the first 16 bytes of a SHA-256, as 32 hex characters. It does not depend on the device, on strides, on
where the memory lies, or on who shares it; it does depend on dtype, shape, every bit (0.0 and -0.0 differ), and, for
several tensors, on their names and order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from samestep.storage import wire

DIGEST_CHARS = 32
_PIECE_BYTES = 4 << 20


class TensorHasher:
    """The digest of one tensor, from its bytes as they come by.

    Args:
        dtype: the tensor's dtype.
        shape: the tensor's shape.
    """

    def __init__(self, dtype: torch.dtype, shape: Iterable[int]) -> None:
        self._sha = hashlib.sha256(f"{wire.name_of(dtype)}{list(shape)}\n".encode())

    def update(self, piece: memoryview | bytes) -> None:
        """Take the next bytes of the tensor, in row-major order."""
        self._sha.update(piece)

    def digest(self) -> str:
        """Return the digest of what came by."""
        return self._sha.hexdigest()[:DIGEST_CHARS]


def pieces(tensor: torch.Tensor) -> Iterator[memoryview]:
    """Yield the bytes of `tensor` in row-major order, some MiB at a time.

    Memory of a contiguous CPU tensor is handed out as it is; anything else is copied piece by piece, never whole.

    Raises:
        TypeError: the tensor is sparse, quantised or on the meta device.
    """
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        kind = f"{tensor.layout} tensor of dtype {wire.name_of(tensor.dtype)} on {tensor.device}"
        raise TypeError(f"A {kind} has no plain bytes to digest or save. Convert it to a dense tensor first.")
    if tensor.numel():
        for piece in _dense_pieces(tensor.detach()):
            dense = piece.resolve_conj().resolve_neg().cpu().contiguous()
            # A single element may have any stride and still count as contiguous; a view as bytes wants 1.
            yield dense.as_strided((dense.numel(),), (1,)).view(torch.uint8).numpy().data


def _dense_pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    if tensor.is_contiguous():
        yield from torch.split(tensor.reshape(-1), max(1, _PIECE_BYTES // tensor.itemsize))
        return
    row_bytes = tensor[0].numel() * tensor.itemsize
    if row_bytes > _PIECE_BYTES:
        for row in tensor:
            yield from _dense_pieces(row)
    else:
        yield from torch.split(tensor, _PIECE_BYTES // row_bytes)


def tensor_digest(tensor: torch.Tensor) -> str:
    """Return the digest of a tensor's dtype, shape and row-major bytes.

    Raises:
        TypeError: the tensor is sparse, quantised or on the meta device.
    """
    hasher = TensorHasher(tensor.dtype, tensor.shape)
    for piece in pieces(tensor):
        hasher.update(piece)
    return hasher.digest()


def tensors_digest(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return the digest of named tensors, in the order given."""
    return joined_digest((name, tensor_digest(tensor)) for name, tensor in named)


def joined_digest(named: Iterable[tuple[str, str]]) -> str:
    """Return what `tensors_digest` returns for tensors whose digests are already known."""
    sha = hashlib.sha256()
    for name, digest in named:
        sha.update(_framed(b"n", name.encode()) + _framed(b"d", digest.encode()))
    return sha.hexdigest()[:DIGEST_CHARS]


def state_digest(state: dict[Any, Any]) -> str:
    """Return the digest of an optimizer's `state_dict()`, or of any nested plain value.

    The order of dict keys does not matter, nor whether a sequence is a list or a tuple. Numbers count by type and
    exact value: 1, 1.0 and True differ, as do 0.0 and -0.0.

    Args:
        state: dicts, lists and tuples of tensors, NumPy arrays, numbers, text, bytes, booleans and None.

    Raises:
        TypeError: it holds something else; the message names where.
    """
    sha = hashlib.sha256()
    for token in _tokens(state, "state"):
        sha.update(token)
    return sha.hexdigest()[:DIGEST_CHARS]


def _framed(tag: bytes, content: bytes) -> bytes:
    """Return content behind its kind and length, so that no two sequences of tokens read alike."""
    return tag + len(content).to_bytes(8, "little") + content


def _tokens(value: Any, where: str) -> Iterator[bytes]:
    if isinstance(value, torch.Tensor):
        yield _framed(b"t", tensor_digest(value).encode())
    elif isinstance(value, dict):
        yield _framed(b"{", str(len(value)).encode())
        for key in sorted(value, key=lambda k: (type(k).__name__, repr(k))):
            yield from _tokens(key, f"a key of {where}")
            yield from _tokens(value[key], f"{where}[{key!r}]")
    elif isinstance(value, list | tuple):
        yield _framed(b"[", str(len(value)).encode())
        for index, item in enumerate(value):
            yield from _tokens(item, f"{where}[{index}]")
    elif isinstance(value, np.ndarray) and value.dtype != object:
        yield _framed(b"t", tensor_digest(torch.from_numpy(np.ascontiguousarray(value))).encode())
    else:
        yield _scalar_token(value.item() if isinstance(value, np.generic) else value, where)


def _scalar_token(value: Any, where: str) -> bytes:
    if value is None or isinstance(value, bool):
        return _framed(b"c", repr(value).encode())
    if isinstance(value, int):
        return _framed(b"i", repr(int(value)).encode())
    if isinstance(value, float):
        return _framed(b"f", float(value).hex().encode())
    if isinstance(value, str):
        return _framed(b"s", str(value).encode())
    if isinstance(value, bytes | bytearray):
        return _framed(b"b", bytes(value))
    raise TypeError(
        f"{where} is a {type(value).__name__}, which has no digest: only tensors, arrays, numbers, text, bytes, None "
        f"and dicts, lists and tuples of these do."
    )
