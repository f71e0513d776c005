"""What every codec is: from one tensor to a number of bytes that is known beforehand, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import torch

from samestep.errors import MismatchError, SettingsError

Key = tuple[int, ...]
"""What random numbers are drawn from: (seed, step, replica, parameter), or whatever names the tensor in the recipe."""

State = dict[str, torch.Tensor]
"""What a codec keeps of one tensor between rounds, by name. It belongs to the caller: its replica, its checkpoints."""

_ALIGNMENT = 64
"""Bytes. MKL changes bits with the address of its operands; at multiples of this it does not."""


class Codec(ABC):
    """A frozen recipe: how one tensor is written as bytes.

    The bytes are a function of (tensor, key, state) alone. They do not depend on workers, on the tensor's strides or
    address, or on any global generator, and none is touched. Tensors may lie on any device; bytes and what is decoded
    lie on the CPU.

    A codec writes what it is given in the *sum dtype*: float64 for float64, float32 for all others.

    NaN and infinity are never hidden: each codec says what becomes of them, and the decoded tensor is never finite if
    the encoded one was not.

    To write another one: a frozen dataclass with `num_bytes`, `_pack` and `_unpack`.
    """

    @property
    def unbiased(self) -> bool:
        """Whether the mean over all keys of what is decoded is what was encoded. Others want `Feedback`."""
        return False

    def at(self, step: int) -> Codec:
        """Return the codec for one step (from 0): this one, unless it says that it warms up."""
        return self

    def fresh(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> State:
        """Return what to keep for a tensor before its first round; empty for most codecs.

        Args:
            shape: of the tensor.
            dtype: of the tensor.
        """
        return {}

    @abstractmethod
    def num_bytes(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
        """Return how many bytes `encode` gives for every tensor of this shape and dtype."""

    def encode(self, tensor: torch.Tensor, key: Key = (), state: State | None = None) -> torch.Tensor:
        """Write a tensor as bytes.

        Args:
            tensor: any shape, strides and floating dtype; it stays as it is.
            key: what random numbers are drawn from. Give each tensor of each step and replica its own.
            state: from `fresh`, or from the round before. Entries are replaced by new tensors, and the tensors in it
                are never written to: whoever keeps `dict(state)` can take the round back. What is missing begins anew;
                None is an empty one.

        Returns:
            uint8, one dimension, `num_bytes(tensor.shape, tensor.dtype)` elements, in memory of its own.

        Raises:
            SettingsError: the tensor is sparse, or not of a floating dtype.
            MismatchError: the state is that of another tensor.
        """
        if tensor.layout is not torch.strided or not tensor.is_floating_point():
            raise SettingsError(
                f"You set the codec {self!r}, but a tensor to encode is {tensor.dtype}, {tensor.layout}. Codecs take "
                f"dense tensors of a floating dtype; leave such a parameter to a recipe without a codec."
            )
        values = tensor.detach().to("cpu", sum_dtype(tensor.dtype)).contiguous()
        return self._pack(values, key, {} if state is None else state)

    def decode(self, payload: torch.Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the tensor that bytes stand for.

        Args:
            payload: from `encode`; any slice of a longer message will do.
            shape: of the tensor that was encoded.
            dtype: of the tensor that was encoded.

        Returns:
            Contiguous, of this shape and the sum dtype, in memory of its own.

        Raises:
            MismatchError: the bytes cannot be such a tensor's.
        """
        stated = self.num_bytes(shape, dtype)
        if payload.dtype != torch.uint8 or payload.shape != (stated,):
            raise MismatchError(
                f"{self!r} writes a {dtype} tensor of shape {tuple(shape)} as {stated} bytes, but got "
                f"{tuple(payload.shape)} elements of {payload.dtype} to decode. Give all workers the same codec, and "
                f"the tensor's own shape."
            )
        return self._unpack(payload.contiguous(), torch.Size(shape), sum_dtype(dtype)).reshape(shape)

    def decode_all(self, payload: torch.Tensor, like: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        """Return the tensors that a message stands for: what `encode` gave for each, one after the other.

        Args:
            payload: the message, uint8.
            like: tensors of the shapes and dtypes that were encoded.

        Raises:
            MismatchError: see `decode`.
        """
        found, start = [], 0
        for tensor in like:
            stop = start + self.num_bytes(tensor.shape, tensor.dtype)
            found.append(self.decode(payload[start:stop], tensor.shape, tensor.dtype))
            start = stop
        return found

    @abstractmethod
    def _pack(self, values: torch.Tensor, key: Key, state: State) -> torch.Tensor:
        """Encode a contiguous CPU tensor of a sum dtype, which may be the caller's memory."""

    @abstractmethod
    def _unpack(self, payload: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Decode bytes of the right number; `dtype` is a sum dtype. The result may have another shape."""


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what tensors of a dtype are added in: float64 for itself, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def num_elements(shape: Sequence[int]) -> int:
    """Return the number of elements of a shape; 1 for that of a number."""
    return torch.Size(shape).numel()


def kept(state: State, name: str, shape: Sequence[int]) -> torch.Tensor | None:
    """Return an entry of a state, which must have this shape, or None if it is missing.

    Raises:
        MismatchError: it has another shape.
    """
    entry = state.get(name)
    if entry is not None and entry.shape != torch.Size(shape):
        raise MismatchError(
            f"The state of a codec holds {name!r} of shape {tuple(entry.shape)}, but the tensor to encode needs "
            f"{tuple(shape)}: it is another tensor's, or another recipe's. Keep one state per replica and parameter."
        )
    return entry


def typed(payload: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return bytes as elements of `dtype`, at an address that suits every kernel; without a copy where that will do."""
    fits = payload.data_ptr() % _ALIGNMENT == 0 and payload.storage_offset() % dtype.itemsize == 0
    return (payload if fits else payload.clone()).view(dtype)


def aligned(values: torch.Tensor) -> torch.Tensor:
    """Return a tensor at an address that suits every kernel; without a copy where that will do."""
    return values if values.data_ptr() % _ALIGNMENT == 0 else values.clone()
