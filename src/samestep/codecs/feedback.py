"""Error feedback: what a codec loses of a tensor is added to the tensor of the next round.

    compensated = tensor + residual
    payload     = encode(compensated)
    residual    = compensated - decode(payload)

So nothing is lost for good: all that was decoded + the residual is all that was given, at any time, up to the rounding
of these lines. Used by 1-bit SGD (Seide et al., Interspeech 2014); that it lets every codec whose error is smaller than
the tensor converge like SGD is shown by Karimireddy, Rebjock, Stich and Jaggi, ICML 2019.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from samestep.codecs.codec import Codec, Key, State, kept, sum_dtype
from samestep.codecs.exact import Exact
from samestep.errors import NonFiniteError, SettingsError

_RESIDUAL = "residual"


@dataclass(frozen=True)
class Feedback(Codec):
    """Any codec, with error feedback, and exact for the first steps if asked to be.

    The state has one more entry, "residual": the tensor's shape in its sum dtype. It belongs to a replica and a
    parameter.

    If what was compensated, or what it decodes to, is not finite, the payload shows it and the state stays as it was.
    If the caller then skips the update, it must also take back the state of all other tensors of that update, whose
    payloads are not applied: keep `dict(state)` of each until the update is made.

    Error: that of the codec, for what was compensated; over rounds, only the residual is missing. A sum of NaN and a
    finite residual is NaN: the payload carries it as the codec says.

    Attributes:
        codec: what encodes.
        warm_up: steps at the beginning that are encoded by `Exact`; `at` tells which.
    """

    codec: Codec
    warm_up: int = 0

    def __post_init__(self) -> None:
        """Look at the arguments.

        Raises:
            SettingsError: codec is none, or has feedback already; or warm_up is not a number of steps.
        """
        if not isinstance(self.codec, Codec) or isinstance(self.codec, Feedback):
            raise SettingsError(
                f"You set Feedback({self.codec!r}), but it takes a codec without feedback of its own. Use "
                f"Feedback(Int8())."
            )
        if not isinstance(self.warm_up, int) or isinstance(self.warm_up, bool) or self.warm_up < 0:
            raise SettingsError(
                f"You set Feedback(warm_up={self.warm_up!r}), but it is a number of steps. Use warm_up=0, or leave it "
                f"out."
            )

    def at(self, step: int) -> Codec:
        return Feedback(Exact()) if step < self.warm_up else Feedback(self.codec.at(step))

    def fresh(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> State:
        return {_RESIDUAL: torch.zeros(tuple(shape), dtype=sum_dtype(dtype)), **self.codec.fresh(shape, dtype)}

    def num_bytes(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
        return self.codec.num_bytes(shape, dtype)

    def _pack(self, values: torch.Tensor, key: Key, state: State) -> torch.Tensor:
        residual = kept(state, _RESIDUAL, values.shape)
        if residual is not None and not _is_finite(residual):
            raise NonFiniteError(
                f"The residual of a tensor of shape {tuple(values.shape)} under {self!r} is not finite, so no later "
                f"round would be. Load a checkpoint from before, or begin with `fresh` ones."
            )
        compensated = values.clone() if residual is None else values + residual
        trial = dict(state)
        payload = self.codec.encode(compensated, key, trial)
        compensated -= self.codec.decode(payload, compensated.shape, compensated.dtype)
        if _is_finite(compensated):
            state.update(trial, **{_RESIDUAL: compensated})
        return payload

    def _unpack(self, payload: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        return self.codec.decode(payload, shape, dtype)


def _is_finite(tensor: torch.Tensor) -> bool:
    """Say whether all elements are finite. The norm shows it in one pass, unless it overflows."""
    return math.isfinite(torch.linalg.vector_norm(tensor)) or bool(torch.isfinite(tensor).all())
