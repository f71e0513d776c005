"""The weights that all sites start from, and what a round makes of them.

A round adds the sites' contributions along the tree, in the order of their names, each with the share of its samples,
and gives the sum to the outer optimizer as a gradient. Buffers become the mean of the sites' own. Where the way back is
compressed, what a round changes is encoded, with error feedback, and the weights become what a site that decodes it
comes to.
"""

from __future__ import annotations

import copy
import zlib
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from samestep.codecs import Exact, Feedback, State
from samestep.core.buffers import join
from samestep.core.tree import middle
from samestep.errors import NonFiniteError
from samestep.sites.table import Gift
from samestep.sites.terms import codec_of, from_values
from samestep.storage import wire
from samestep.storage.digest import tensors_digest

_NUMBER = zlib.crc32(b"the meeting place")


@dataclass(frozen=True)
class Content:
    """What a contribution holds.

    Attributes:
        gift: whose it is.
        step: what the codec is to be at.
        training: in which the weights are that it is measured from.
        payload: every parameter encoded, one after the other; uint8.
        buffers: the site's, uint8.
    """

    gift: Gift
    step: int
    training: str
    payload: torch.Tensor
    buffers: torch.Tensor


class OuterState:
    """Weights, outer optimizer and buffers of the sites together."""

    def __init__(self, terms: Mapping[str, Any], weights: Sequence[torch.Tensor], buffers: torch.Tensor):
        """Begin with some weights.

        Args:
            terms: the settings that all sites share, shapes and dtypes.
            weights: in order.
            buffers: uint8.

        Raises:
            ValueError: the terms cannot be read, or the weights are others than they say.
        """
        shapes = [[list(w.shape), wire.name_of(w.dtype)] for w in weights]
        if shapes != terms["weights"] or buffers.dtype != torch.uint8 or buffers.numel() != terms["buffers"]["bytes"]:
            raise ValueError("The weights are others than the site says.")
        settings = terms["settings"]
        self._codec, back = codec_of(settings["codec"]), codec_of(settings["back"])
        self._back = back if back.unbiased or isinstance(back, Feedback) else Feedback(back)
        self._kept: list[State] = [self._back.fresh(w.shape, w.dtype) for w in weights]
        self._changes: deque[bytes] = deque(maxlen=settings["bound"] + 1)
        self._parameters = [torch.nn.Parameter(w.clone()) for w in weights]
        self._optimizer = from_values(settings["outer"]).make(self._parameters)
        self._buffers = buffers.clone()
        self._segments = [
            (slice(start, stop), None if name is None else wire.dtype_named(name))
            for start, stop, name in terms["buffers"]["segments"]
        ]
        self._packed = b""

    @property
    def largest(self) -> int:
        """The bytes of the longest message that a site may send."""
        exact = sum(p.numel() * p.element_size() for p in self._parameters)
        return 2 * exact + 2 * self._buffers.numel() + 256 * len(self._parameters) + (1 << 16)

    def check(self, content: Content) -> None:
        """Check that a contribution is what was agreed on.

        Raises:
            ValueError: it is not.
            NonFiniteError: it holds NaN or infinity.
        """
        codec = self._codec.at(content.step)
        stated = sum(codec.num_bytes(p.shape, p.dtype) for p in self._parameters)
        if content.payload.shape != (stated,) or content.payload.dtype != torch.uint8:
            raise ValueError(f"{stated} bytes are due, not {tuple(content.payload.shape)} of {content.payload.dtype}.")
        if content.buffers.shape != self._buffers.shape or content.buffers.dtype != torch.uint8:
            raise ValueError("The buffers are others than were agreed on.")
        if not all(bool(torch.isfinite(tensor).all()) for tensor in self._decoded(content)):
            raise NonFiniteError(
                f"What site {content.gift.site!r} learned holds NaN or infinity. Lower the learning rate, or clip with "
                f"step.update(clip_norm=1.0)."
            )

    def make(self, contents: Sequence[Content], step: int) -> None:
        """Make a round. Where it raises, everything is as before.

        Args:
            contents: the contributions, in the order of their sites.
            step: number of rounds before it.

        Raises:
            NonFiniteError: the new weights would hold NaN or infinity.
        """
        total = sum(content.gift.items for content in contents)
        shares = [content.gift.items / total for content in contents]

        def summed(lo: int, hi: int) -> list[torch.Tensor]:
            if hi - lo == 1:
                return [tensor.mul_(shares[lo]) for tensor in self._decoded(contents[lo])]
            mid = middle(lo, hi)
            return [a.add_(b) for a, b in zip(summed(lo, mid), summed(mid, hi), strict=True)]

        before = [parameter.detach().clone() for parameter in self._parameters]
        optimizer = copy.deepcopy(self._optimizer.state_dict())
        try:
            self._step(summed(0, len(contents)))
        except BaseException:
            for parameter, old in zip(self._parameters, before, strict=True):
                parameter.data.copy_(old)
            self._optimizer.load_state_dict(optimizer)
            raise
        # A difference of which nothing is left out is as long as the weights, which say it to the bit.
        if not isinstance(self._back, Exact):
            self._changes.append(self._encoded(before, step))
        if self._buffers.numel():
            join(self._segments, [content.buffers for content in contents], shares, self._buffers)
        self._packed = b""

    def _step(self, gradients: Sequence[torch.Tensor]) -> None:
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient.to(parameter.dtype)
        self._optimizer.step()
        self._optimizer.zero_grad()
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self._parameters):
            raise NonFiniteError("the new weights would hold NaN or infinity")

    def since(self, base: int, num_rounds: int) -> dict[str, Any]:
        """Return what a site needs that has the weights of an earlier round: the changes since, or the newest state.

        Args:
            base: rounds that were made when the site got its weights.
            num_rounds: rounds that are made.
        """
        count = num_rounds - base
        if not 0 < count <= len(self._changes):
            return self.state(num_rounds)
        digest = tensors_digest((str(i), p.detach()) for i, p in enumerate(self._parameters))
        changes = list(self._changes)[-count:]
        return {"round": num_rounds, "changes": changes, "digest": digest, "buffers": self._buffers}

    def state(self, num_rounds: int) -> dict[str, Any]:
        """Return the newest state: `state`, weights and buffers as packed bytes, and how many rounds made it."""
        if not self._packed:
            weights = [p.detach() for p in self._parameters]
            self._packed = wire.pack({"weights": weights, "buffers": self._buffers})
        return {"round": num_rounds, "state": self._packed}

    def to_checkpoint(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[int, dict[str, Any]]]:
        """Return the weights, the other tensors, and the outer optimizer's numbers, for a checkpoint."""
        state = self._optimizer.state_dict()["state"]
        tensors = {f"outer.{i}.{name}": v for i, kept in state.items() for name, v in kept.items() if _is_tensor(v)}
        numbers = {i: {name: v for name, v in kept.items() if not _is_tensor(v)} for i, kept in state.items()}
        tensors |= {f"codec.{i}.{name}": v for i, kept in enumerate(self._kept) for name, v in kept.items()}
        weights = {f"{i}": p.detach() for i, p in enumerate(self._parameters)}
        if self._buffers.numel():
            tensors["buffers"] = self._buffers
        return weights, tensors, numbers

    def load(self, tensors: Mapping[str, torch.Tensor], numbers: Mapping[Any, Mapping[str, Any]]) -> None:
        """Take what `to_checkpoint` gave beside the weights, with which this began."""
        state: dict[int, dict[str, Any]] = {int(i): dict(kept) for i, kept in numbers.items()}
        for name, tensor in tensors.items():
            role, _, rest = name.partition(".")
            index, _, key = rest.partition(".")
            if role == "outer":
                state.setdefault(int(index), {})[key] = tensor
            elif role == "codec":
                self._kept[int(index)][key] = tensor
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _decoded(self, content: Content) -> list[torch.Tensor]:
        return self._codec.at(content.step).decode_all(content.payload, self._parameters)

    def _encoded(self, before: Sequence[torch.Tensor], step: int) -> bytes:
        """Return what the round changes, encoded, and let the weights be what comes of that."""
        codec, payloads = self._back.at(step), []
        for index, (parameter, old) in enumerate(zip(self._parameters, before, strict=True)):
            payload = codec.encode(old - parameter.detach(), (_NUMBER, step, index), self._kept[index])
            parameter.data.copy_(old - codec.decode(payload, old.shape, old.dtype))
            payloads.append(payload)
        return bytes(wire.bytes_of(torch.cat(payloads)))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)
