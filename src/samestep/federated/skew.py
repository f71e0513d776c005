"""Clients whose labels differ: samples dealt out by the Dirichlet scheme of Hsu, Qi, Brown (2019).

Each client draws a distribution over labels, and then its samples by it, without replacement. The smaller alpha, the
fewer labels a client has: 100 is nearly alike, 0.1 one or two labels each.

All draws are counter-based, and logarithms are computed here by additions, multiplications and divisions alone, which
every IEEE machine rounds alike: the same clients everywhere, whatever its mathematical library.
"""

from __future__ import annotations

import math

import numpy as np

from samestep.core.randomness import key
from samestep.data.mixing import GOLDEN, MASK, mix
from samestep.data.permutation import Permutation
from samestep.data.split import shard_bounds
from samestep.errors import SettingsError

_GAMMA, _DEAL, _SHUFFLE = 45, 46, 47
"""First parts of keys, so that draws for different ends are unrelated."""

_LN2 = 0.6931471805599453


def label_skew(labels: np.ndarray, num_clients: int, alpha: float, seed: int) -> list[np.ndarray]:
    """Return the samples of each client: every sample goes to one client, and their numbers differ by at most one.

    The last clients take what is left, so theirs follow what they drew less closely.

    Args:
        labels: [samples], whole numbers or any values that can be sorted.
        num_clients: number of clients, at most as many as samples.
        alpha: concentration, above 0.
        seed: another seed deals otherwise.

    Returns:
        For each client its samples, int64, ascending.

    Raises:
        SettingsError: fewer samples than clients, or an alpha that is not above 0.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1:
        raise SettingsError(f"Labels of shape {labels.shape} were given; a label skew takes one label per sample.")
    if not (math.isfinite(alpha) and alpha > 0):
        raise SettingsError(f"You set alpha={alpha} for a label skew; it must be above 0: 100 is nearly alike.")
    if not 1 <= num_clients <= len(labels):
        raise SettingsError(
            f"You set num_clients={num_clients}, but there are {len(labels)} samples, and no client may be without "
            f"data. Take 1 to {len(labels)} clients."
        )
    values, label_of = np.unique(labels, return_inverse=True)
    decks = [_shuffled(np.flatnonzero(label_of == label), seed, label) for label in range(len(values))]
    left = np.array([len(deck) for deck in decks])
    prior = left / len(labels)
    shares = dirichlet(alpha * prior, num_clients, seed)
    out = []
    for client, (start, stop) in enumerate(shard_bounds(0, len(labels), num_clients)):
        counts = _deal(shares[client], left, stop - start, (seed, client))
        taken = [deck[rest - count : rest] for deck, rest, count in zip(decks, left, counts, strict=True)]
        left = left - counts
        out.append(np.sort(np.concatenate(taken)))
    return out


def dirichlet(alphas: np.ndarray, num_rows: int, seed: int) -> np.ndarray:
    """Return rows drawn from a Dirichlet distribution, [num_rows, len(alphas)], each adding up to 1."""
    alphas = np.asarray(alphas, dtype=np.float64)
    logs = _log_gammas(np.tile(alphas, num_rows), seed).reshape(num_rows, len(alphas))
    weights = _exp(logs - logs.max(axis=1, keepdims=True))
    # One addition after the other: NumPy's sums depend on the machine's vectors.
    return weights / np.add.accumulate(weights, axis=1)[:, -1:]


def _deal(shares: np.ndarray, left: np.ndarray, size: int, place: tuple[int, int]) -> np.ndarray:
    """Return how many samples of each label a client takes: drawn by `shares`, again where a label has run out."""
    counts = np.zeros(len(left), dtype=np.int64)
    attempt = 0
    while size > 0:
        rest = left - counts
        weights = np.where(rest > 0, shares, 0.0)
        if not weights.any():
            weights = rest.astype(np.float64)
        bounds = np.add.accumulate(weights)
        draws = _uniform(size, key(_DEAL, *place, attempt)) * bounds[-1]
        drawn = np.bincount(np.searchsorted(bounds, draws, side="right").clip(max=len(left) - 1), minlength=len(left))
        taken = np.minimum(drawn, rest)
        counts, size, attempt = counts + taken, size - int(taken.sum()), attempt + 1
    return counts


def _log_gammas(alphas: np.ndarray, seed: int) -> np.ndarray:
    """Return the logarithm of one Gamma(alpha, 1) draw for each alpha (Marsaglia, Tsang 2000).

    Draws are for alpha + 1 and brought back by a factor of uniform ** (1 / alpha), so that any alpha above 0 works.
    """
    d = alphas + (1 - 1 / 3)
    c = 1 / np.sqrt(9 * d)
    out = np.empty(len(alphas))
    open_, attempt = np.arange(len(alphas)), 0
    while len(open_):
        a, b, u = (_uniform(len(alphas), key(_GAMMA, seed, attempt, draw))[open_] for draw in range(3))
        a, b = 2 * a - 1, 2 * b - 1
        square = a * a + b * b
        inside = (square < 1) & (square > 0)
        square = np.where(inside, square, 0.5)
        x = a * np.sqrt(-2 * _log(square) / square)
        root = 1 + c[open_] * x
        inside &= root > 0
        root = np.where(inside, root, 1.0)
        v = root * root * root
        log_v = _log(v)
        inside &= _log(u) < 0.5 * x * x + d[open_] * (1 - v + log_v)
        out[open_[inside]] = (_log(d[open_]) + log_v)[inside]
        open_, attempt = open_[~inside], attempt + 1
    return out + _log(_uniform(len(alphas), key(_GAMMA, seed, 0, 3))) / alphas


def _shuffled(samples: np.ndarray, seed: int, label: int) -> np.ndarray:
    return samples[Permutation(len(samples), key(_SHUFFLE, seed, label)).ids(0, len(samples))]


def _uniform(length: int, draws_key: int) -> np.ndarray:
    """Return float64 numbers inside (0, 1)."""
    places = np.arange(1, length + 1, dtype=np.uint64) * np.uint64(GOLDEN) + np.uint64(draws_key & MASK)
    return ((mix(places) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def _log(x: np.ndarray) -> np.ndarray:
    """Return the natural logarithm of positive numbers to some 1e-15: 2 artanh((m-1) / (m+1)) + e ln 2."""
    mantissa, exponent = np.frexp(x)
    small = mantissa < 0.7071067811865476
    mantissa, exponent = np.where(small, 2 * mantissa, mantissa), exponent - small
    s = (mantissa - 1) / (mantissa + 1)
    square, series = s * s, np.zeros_like(s)
    for k in range(23, 0, -2):
        series = series * square + 1 / k
    return 2 * s * series + exponent * _LN2


def _exp(x: np.ndarray) -> np.ndarray:
    """Return e**x for x up to 0 to some 1e-15; 0 where x is far below."""
    x = np.maximum(x, -745.0)
    exponent = np.rint(x / _LN2)
    rest, series = x - exponent * _LN2, np.ones_like(x)
    for k in range(18, 0, -1):
        series = series * rest / k + 1
    return np.ldexp(series, exponent.astype(np.int64))
