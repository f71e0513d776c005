"""Finds NaN and infinity in gradients, while these are still in cache.

The sum of a gradient's squares is finite only if every element is; it takes one pass and no memory. Where it is not
finite, the elements themselves are looked at. They may all be finite but *huge* (above 1.8e19 in float32); that is
legal, but then a sum of such gradients may overflow, and has to be looked at before it is used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

CHUNK = 65_536
"""Elements. As much as stays in a core's cache between being copied and being looked at."""

_SMALL = 4_096
"""Elements. So small a gradient is cheap to read again; the cost of a call is most of what looking costs."""

_norm = torch.linalg.vector_norm
_HALF = (torch.float16, torch.bfloat16)
_HUGE = 1e18
"""Sums of some dozens of elements below it do not overflow in float32."""

Found = list[list[int]]
"""[leaf, first parameter, last parameter, number of parameters] for each leaf with gradients that are not finite."""


class Finite:
    """What was seen in the gradients of one pass.

    Attributes:
        huge: whether sums may overflow although each gradient is finite.
    """

    def __init__(self, parameters: Sequence[torch.Tensor]):
        """Begin with nothing seen of the gradients of `parameters`."""
        # Sums are rounded to the parameters' dtypes, and float16 overflows at 65,504 already.
        self._narrow = any(p.dtype == torch.float16 for p in parameters)
        self._waits = any(not p.is_cpu for p in parameters)
        self.huge = self._narrow
        self._bad: list[tuple[int, int]] = []
        self._small: list[tuple[int, int, torch.Tensor]] = []
        self._later: list[tuple[int, int, torch.Tensor]] = []

    def begin_pass(self) -> None:
        """Forget what was seen."""
        self.huge = self._narrow
        self._bad.clear()
        self._small.clear()
        self._later.clear()

    def look(self, leaf: int, parameter: int, gradient: torch.Tensor) -> None:
        """Look at the gradient of one parameter in one leaf; at a small one when the shard ends."""
        if self._waits:
            # The host must not wait for the device at every gradient. The largest element cannot overflow.
            if gradient.numel():
                self._later.append((leaf, parameter, _norm(gradient, math.inf)))
            return
        if gradient.numel() <= _SMALL:
            self._small.append((leaf, parameter, gradient))
            return
        # Naming a dtype costs a third of a microsecond.
        size = _norm(gradient, dtype=torch.float32) if gradient.dtype in _HALF else _norm(gradient)
        if not size.item() < _HUGE:
            self._look_closer(leaf, parameter, gradient)

    def copy(self, leaf: int, parameter: int, gradient: torch.Tensor, chunks: Sequence[np.ndarray]) -> None:
        """Copy a gradient and look at it, a piece at a time, each while it is in cache.

        Where a gradient is larger than the cache, looking costs half of what it costs in a pass of its own.

        Args:
            leaf: as in `look`.
            parameter: as in `look`.
            gradient: contiguous, of the dtype of `chunks`.
            chunks: where to copy it, from `chunks_of`.
        """
        flat, start, total = gradient.view(-1).numpy(), 0, 0.0
        with np.errstate(over="ignore", invalid="ignore"):
            for chunk in chunks:
                part = flat[start : start + CHUNK]
                chunk[:] = part
                # Twice as fast as in torch.
                total += float(np.dot(part, part))
                start += CHUNK
        if not total < _HUGE * _HUGE:
            self._look_closer(leaf, parameter, gradient)

    def look_at_all(self, gradients: Sequence[torch.Tensor | None]) -> None:
        """Look at all gradients of a pass of one leaf in one call, which is cheaper where nothing else was added.

        Args:
            gradients: one per parameter, None where there is none.
        """
        self._look_together([(0, index, gradient) for index, gradient in enumerate(gradients) if gradient is not None])

    def end_shard(self) -> None:
        """Look at the small gradients of a shard. None of them may have been written to since."""
        self._look_together(self._small)
        self._small.clear()

    def found(self) -> Found:
        """Return the leaves with gradients that are not finite."""
        if self._later:
            sizes = torch.stack([size for _, _, size in self._later]).tolist()
            for (leaf, parameter, _), size in zip(self._later, sizes, strict=True):
                if not size < math.inf:
                    self._bad.append((leaf, parameter))
                elif size > _HUGE:
                    self.huge = True
            self._later.clear()
        parameters: dict[int, list[int]] = {}
        for leaf, parameter in self._bad:
            parameters.setdefault(leaf, []).append(parameter)
        return [[leaf, min(bad), max(bad), len(bad)] for leaf, bad in sorted(parameters.items())]

    def _look_together(self, seen: Sequence[tuple[int, int, torch.Tensor]]) -> None:
        if not seen:
            return
        norms = torch.stack(torch._foreach_norm([gradient for _, _, gradient in seen])).tolist()
        if not sum(norms) < _HUGE:
            for norm, (leaf, parameter, gradient) in zip(norms, seen, strict=True):
                if not norm < _HUGE:
                    self._look_closer(leaf, parameter, gradient)

    def _look_closer(self, leaf: int, parameter: int, gradient: torch.Tensor) -> None:
        if bool(torch.isfinite(gradient).all()):
            self.huge = True
        else:
            self._bad.append((leaf, parameter))


def chunks_of(place: torch.Tensor) -> list[np.ndarray] | None:
    """Return the memory of `place` in pieces for `Finite.copy`, or None where that is no gain or cannot be done."""
    suits = place.is_cpu and place.dtype in (torch.float32, torch.float64) and place.is_contiguous()
    if not suits or place.numel() < 4 * CHUNK or torch.get_num_threads() > 1:
        return None
    flat = place.view(-1).numpy()
    return [flat[start : start + CHUNK] for start in range(0, len(flat), CHUNK)]
