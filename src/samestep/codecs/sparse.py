"""Codecs that send a share of the elements and none of the rest. Both lose most of a tensor: they want `Feedback`.

Deep Gradient Compression (Lin, Han, Mao, Wang, Dally, ICLR 2018) sends the largest 0.1 % of a gradient; it also
corrects the momentum of elements that wait, clips per worker and raises sparsity over the first epochs. Only the choice
of elements is done here, exactly, where they estimate the threshold from a sample. That what is kept is enough if the
rest is added to the next round, for largest and for random elements alike, is shown by Stich, Cordonnier and Jaggi,
"Sparsified SGD with Memory", NeurIPS 2018.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from samestep.codecs.codec import Codec, Key, State, num_elements, sum_dtype
from samestep.codecs.noise import Noise, seed_of
from samestep.errors import MismatchError, SettingsError

_SEED_BYTES = 8
_INDEX_BYTES = 4


class _Share(Codec):
    """What the two have in common: how many elements are sent."""

    share: float

    def __post_init__(self) -> None:
        """Look at the arguments.

        Raises:
            SettingsError: share is not above 0 and at most 1.
        """
        if not isinstance(self.share, int | float) or not 0 < self.share <= 1:
            raise SettingsError(
                f"You set {type(self).__name__}(share={self.share!r}), but it is the share of the elements that are "
                f"sent, above 0 and at most 1. Use share=0.01 for one in a hundred."
            )

    def num_sent(self, count: int) -> int:
        """Return how many of `count` elements are sent: the share, rounded, but at least one."""
        return min(count, max(1, round(self.share * count)))


@dataclass(frozen=True)
class TopK(_Share):
    """The elements of largest magnitude, as they are; of equal ones, those that come first.

        payload   | values (sum dtype) | positions: 4 bytes each, or one bit per element if that is shorter |

    Error: an element that is sent has none; any other is lost, and no larger than the smallest that is sent. NaN counts
    as the largest, then infinity: they are sent before all others.

    Attributes:
        share: of the elements; above 0, at most 1.
    """

    share: float = 0.01

    def num_bytes(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
        count = num_elements(shape)
        sent = self.num_sent(count)
        return sent * sum_dtype(dtype).itemsize + (_INDEX_BYTES * sent if _has_list(sent, count) else -(-count // 8))

    def _pack(self, values: torch.Tensor, key: Key, state: State) -> torch.Tensor:
        flat = values.reshape(-1).numpy()
        payload = torch.empty(self.num_bytes(values.shape, values.dtype), dtype=torch.uint8)
        sent = self.num_sent(len(flat))
        places = _largest(flat, sent)
        size = sent * flat.itemsize
        everything = payload.numpy()
        everything[:size].view(flat.dtype)[:] = flat[places]
        if _has_list(sent, len(flat)):
            everything[size:].view(np.uint32)[:] = places
        else:
            chosen = np.zeros(len(flat), bool)
            chosen[places] = True
            everything[size:] = np.packbits(chosen)
        return payload

    def _unpack(self, payload: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        out = torch.zeros(shape.numel(), dtype=dtype)
        flat, everything = out.numpy(), payload.numpy()
        sent = self.num_sent(len(flat))
        size = sent * flat.itemsize
        if _has_list(sent, len(flat)):
            places: np.ndarray = everything[size:].view(np.uint32)
        else:
            places = np.flatnonzero(np.unpackbits(everything[size:], count=len(flat)))
        _put(flat, places, everything[:size].view(flat.dtype))
        return out


@dataclass(frozen=True)
class RandomK(_Share):
    """Elements at random, as they are; positions are drawn again from the payload's seed, so they cost no bytes.

        payload   | seed (8 bytes) | values (sum dtype) |

    The tensor, begun at a random place and closed to a ring, is cut into as many runs as elements are sent, equal but
    for one element; one is drawn of each. So every element has the same chance, which is all that the analysis of
    random-k asks for, and drawing costs nothing for those that stay.

    Error: an element that is sent has none; any other is lost. Values are not multiplied by 1 / share: with `Feedback`
    that would diverge. If the tensor is not finite, all that is sent is NaN.

    Attributes:
        share: of the elements; above 0, at most 1.
    """

    share: float = 0.01

    def num_bytes(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
        return _SEED_BYTES + self.num_sent(num_elements(shape)) * sum_dtype(dtype).itemsize

    def _pack(self, values: torch.Tensor, key: Key, state: State) -> torch.Tensor:
        flat = values.reshape(-1).numpy()
        payload = torch.empty(self.num_bytes(values.shape, values.dtype), dtype=torch.uint8)
        seed = seed_of(key)
        everything = payload.numpy()
        everything[:_SEED_BYTES].view(np.uint64)[:] = seed
        sent = everything[_SEED_BYTES:].view(flat.dtype)
        sent[:] = flat[_drawn(seed, len(sent), len(flat))]
        if not _is_finite(flat):
            sent[:] = math.nan
        return payload

    def _unpack(self, payload: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        out = torch.zeros(shape.numel(), dtype=dtype)
        flat, everything = out.numpy(), payload.numpy()
        seed = int(everything[:_SEED_BYTES].view(np.uint64)[0])
        sent = everything[_SEED_BYTES:].view(flat.dtype)
        flat[_drawn(seed, len(sent), len(flat))] = sent
        return out


def _largest(flat: np.ndarray, count: int) -> np.ndarray:
    """Return the positions of the largest magnitudes, ascending.

    Without their signs, the bits of floating numbers are ordered as whole numbers, NaN above infinity.
    """
    if not count:
        return np.empty(0, np.int64)
    whole = np.dtype(f"i{flat.itemsize}")
    sizes = flat.view(whole) & np.iinfo(whole).max
    least = np.partition(sizes, len(sizes) - count)[len(sizes) - count]
    above = np.flatnonzero(sizes > least)
    equal = np.flatnonzero(sizes == least)[: count - len(above)]
    return np.sort(np.concatenate([above, equal]))


def _drawn(seed: int, sent: int, count: int) -> np.ndarray:
    """Return `sent` of `count` positions, drawn from a seed."""
    if not sent:
        return np.empty(0, np.int64)
    noise = Noise(seed)
    start = noise.below(count)
    cuts = np.arange(sent + 1, dtype=np.int64) * count // sent
    within = noise.uint32(sent).astype(np.int64) * np.diff(cuts) >> 32
    return (cuts[:-1] + within + start) % count


def _is_finite(flat: np.ndarray) -> bool:
    """Say whether all elements are finite. The sum of squares shows it in one pass, unless it overflows."""
    with np.errstate(all="ignore"):
        return math.isfinite(np.dot(flat, flat)) or bool(np.isfinite(flat).all())


def _has_list(sent: int, count: int) -> bool:
    """Say whether positions go as a list: it is no longer than one bit per element, and all positions fit into it."""
    return _INDEX_BYTES * sent <= -(-count // 8) and count <= 1 << 8 * _INDEX_BYTES


def _put(flat: np.ndarray, places: np.ndarray, values: np.ndarray) -> None:
    """Write values at positions that came in a message."""
    if len(places) != len(values) or (len(places) and int(places.max()) >= len(flat)):
        raise MismatchError(
            f"A message of TopK names {len(places)} positions for {len(values)} of {len(flat)} elements: it is "
            f"damaged, or of another codec or tensor. Give all workers the same codec."
        )
    flat[places] = values
