"""Differential privacy of clients: each update is clipped, noise is added to their sum, an accountant counts.

    sum over clients of  update * min(1, clip / |update|)   +   normal noise of deviation  noise * clip
                                                                ------------------------------------- / divisor
The promise (epsilon, delta) is about one client's whole data set, against who sees every round's result and trusts the
server that adds the noise. The noise here is drawn from the run's seed, so that runs can be repeated: it protects from
those who do not know the seed. Take a secret one (`secrets.randbits(120)`) where it matters. Noise in floating point
has gaps that an adversary with exact results can use (Mironov 2012); round results before they are published.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch

from samestep.errors import BudgetError, SettingsError
from samestep.federated.aggregation import clip_factor
from samestep.federated.extra import extra_module
from samestep.federated.stream import Stream, secret_of

_BLOCK = 8_192
"""Elements of noise drawn at once, always from the same places, so that a part equals that part of the whole."""

_ORDERS = (*range(2, 65), 128, 256, 512, 1024)
"""Orders of the Renyi divergence. Whole ones have closed forms; the others gain less than 1 % and may not converge."""

_MOST_ROUNDS = 1 << 24
_FINE = 1_000_000
"""Sampling without replacement is counted for this many clients."""


@dataclass(frozen=True)
class Privacy:
    """Clipping, noise and budget.

    Args:
        clip: largest norm of one client's update, over all parameters together. Clients count once each: no weights.
        noise: deviation of the noise on the sum, in units of `clip`; 0 for clipping alone.
        delta: probability with which the bound on epsilon may fail; below 1 / (number of clients).
        budget: largest epsilon; training stops before the round that would exceed it. None for no limit.
        sampling: how a round's clients are drawn: "poisson" (`poisson_of`: each on its own; one client more or less),
            or "fixed" (`sample_of`: a fixed number; one client replaced by another, which takes twice the noise and is
            known to have looser bounds: epsilon is several times as large).

    Raises:
        SettingsError: settings outside of these.
    """

    clip: float
    noise: float
    delta: float
    budget: float | None = None
    sampling: Literal["poisson", "fixed"] = "poisson"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.clip) and self.clip > 0):
            raise SettingsError(f"You set Privacy(clip={self.clip}), the largest norm of updates; it must be > 0.")
        if not (math.isfinite(self.noise) and self.noise >= 0):
            raise SettingsError(f"You set Privacy(noise={self.noise}), in units of clip; it must be 0 or more.")
        if not 0 < self.delta < 1:
            raise SettingsError(f"You set Privacy(delta={self.delta}), a probability; it is above 0 and below 1.")
        if self.budget is not None and not self.budget > 0:
            raise SettingsError(f"You set Privacy(budget={self.budget}), the largest epsilon; it must be above 0.")
        if self.budget is not None and not self.noise:
            raise SettingsError(
                f"You set Privacy(budget={self.budget}) with noise=0, which keeps nothing private: epsilon is infinite "
                f"after one round. Set noise, about 0.5 to 4, or leave the budget out."
            )
        if self.sampling not in ("poisson", "fixed"):
            raise SettingsError(f'You set Privacy(sampling={self.sampling!r}); it is "poisson" or "fixed".')

    def prepare(self, update: Sequence[torch.Tensor]) -> float:
        """Return the factor that clips one client's update, as `Aggregation.prepare` does; 0 if it is not finite.

        Args:
            update: one flat tensor per parameter, in parameter order.
        """
        return clip_factor(update, self.clip)

    def add_noise(
        self, flat: torch.Tensor, *, divisor: float, seed: int, round: int, parameter: int, start: int = 0
    ) -> None:
        """Add noise of deviation noise * clip / divisor in place, the same whatever part of a parameter is asked for.

        Args:
            flat: a run of the mean update of one parameter.
            divisor: what the sum was divided by; with "poisson" it must not depend on who was drawn: use the
                expected number, rate * clients.
            seed: the run's seed.
            round: the round's number.
            parameter: the parameter's index.
            start: position of the run's first element in the parameter.

        Raises:
            SettingsError: the extra that holds the generator is not installed.
        """
        if not self.noise:
            return
        stream = Stream(secret_of("noise", seed, round, parameter))
        deviation = self.noise * self.clip / divisor
        stop = start + len(flat)
        for first in range(start // _BLOCK * _BLOCK, stop, _BLOCK):
            lo, hi = max(first, start), min(first + _BLOCK, stop)
            drawn = torch.from_numpy(_normal(stream, first)[lo - first : hi - first]).mul_(deviation)
            flat[lo - start : hi - start].add_(drawn.to(device=flat.device, dtype=flat.dtype))

    def epsilon(self, num_rounds: int, rate: float) -> float:
        """Return the epsilon of so many rounds, by the Renyi accountant of Google's dp-accounting.

        Args:
            num_rounds: rounds done, 0 or more.
            rate: probability, or share, with which a client takes part in one round.

        Raises:
            SettingsError: a rate that is none; or the extra that holds the accountant is not installed.
        """
        if not 0 < rate <= 1:
            raise SettingsError(f"You set a sampling rate of {rate!r}; it is above 0 and up to 1.")
        if not num_rounds:
            return 0.0
        return _epsilon(self.noise, self.sampling, self.delta, num_rounds, rate) if self.noise else math.inf

    def num_rounds(self, rate: float) -> int | None:
        """Return how many rounds the budget allows, None where there is no budget."""
        if self.budget is None:
            return None
        fits, fails = 0, 1
        while fails < _MOST_ROUNDS and self.epsilon(fails, rate) <= self.budget:
            fits, fails = fails, 2 * fails
        while fails - fits > 1:
            middle = (fits + fails) // 2
            fits, fails = (middle, fails) if self.epsilon(middle, rate) <= self.budget else (fits, middle)
        return fits

    def check(self, num_rounds: int, rate: float) -> None:
        """Check, before a round, that the budget allows it.

        Args:
            num_rounds: rounds done when it is over.
            rate: as in `epsilon`.

        Raises:
            BudgetError: it does not; training must stop here.
        """
        if self.budget is None:
            return
        epsilon = self.epsilon(num_rounds, rate)
        if epsilon > self.budget:
            spent = self.epsilon(num_rounds - 1, rate)
            raise BudgetError(
                f"You set Privacy(budget={self.budget:g}): with {num_rounds} rounds epsilon would be {epsilon:.4g} at "
                f"delta={self.delta:g}, so training stops after {num_rounds - 1}, where it is {spent:.4g}. For more "
                f"rounds set more noise (now {self.noise:g}), a smaller sample (now {rate:g} of the clients), or a "
                f"larger budget."
            )


@lru_cache(maxsize=4096)
def _epsilon(noise: float, sampling: str, delta: float, num_rounds: int, rate: float) -> float:
    accounting = extra_module("dp_accounting", "Counting a privacy budget")
    renyi = extra_module("dp_accounting.rdp", "Counting a privacy budget")
    if sampling == "poisson":
        relation = accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
        event = accounting.PoissonSampledDpEvent(rate, accounting.GaussianDpEvent(noise))
    else:
        # Replacing one clipped update by another moves the sum by up to 2 * clip.
        relation = accounting.NeighboringRelation.REPLACE_ONE
        number = math.ceil(rate * _FINE - 1e-6)
        event = accounting.SampledWithoutReplacementDpEvent(_FINE, number, accounting.GaussianDpEvent(noise / 2))
    accountant = renyi.RdpAccountant(_ORDERS, relation)
    accountant.compose(event, num_rounds)
    return float(accountant.get_epsilon(delta))


def _normal(stream: Stream, first: int) -> np.ndarray:
    """Return the standard normal numbers at first .. first + _BLOCK - 1, float64 (Box and Muller 1958)."""
    words = stream.words(first, first + _BLOCK, np.dtype(np.uint64)) >> np.uint64(11)
    uniform = (words.astype(np.float64) + 0.5) * 2.0**-53
    radius = np.sqrt(-2.0 * np.log(uniform[: _BLOCK // 2]))
    angle = 2.0 * math.pi * uniform[_BLOCK // 2 :]
    return np.concatenate((radius * np.cos(angle), radius * np.sin(angle)))
