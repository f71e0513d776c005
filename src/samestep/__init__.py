"""Data-parallel training whose result does not depend on the machines.

Names are imported when they are first used, so `import samestep` costs nothing and does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from samestep.agree.federated import Federated
    from samestep.agree.local import Local
    from samestep.agree.outer import Adaptive, Average, Momentum, Nesterov
    from samestep.agree.stale import Stale
    from samestep.agree.synchronous import Synchronous
    from samestep.errors import (
        BudgetError,
        CheckpointError,
        DataError,
        EditedWeightsError,
        IntegrityError,
        MismatchError,
        NonFiniteError,
        PeerError,
        SamestepError,
        SettingsError,
        UnmaskingError,
        UsageError,
        WorkerError,
    )
    from samestep.federated.aggregation import Median, NormBound, TrimmedMean, WeightedMean
    from samestep.federated.clients import Clients
    from samestep.federated.fixed_point import FixedPoint
    from samestep.federated.masking import Masking
    from samestep.federated.privacy import Privacy
    from samestep.loop.run import Run
    from samestep.loop.step import Step
    from samestep.settings import launch
    from samestep.sites.recipe import Sites

_HOMES = {
    "Adaptive": "samestep.agree.outer",
    "Average": "samestep.agree.outer",
    "Local": "samestep.agree.local",
    "Momentum": "samestep.agree.outer",
    "Nesterov": "samestep.agree.outer",
    "launch": "samestep.settings",
    "Run": "samestep.loop.run",
    "Step": "samestep.loop.step",
    "Sites": "samestep.sites.recipe",
    "Stale": "samestep.agree.stale",
    "Synchronous": "samestep.agree.synchronous",
    "Federated": "samestep.agree.federated",
    "Clients": "samestep.federated.clients",
    "WeightedMean": "samestep.federated.aggregation",
    "NormBound": "samestep.federated.aggregation",
    "TrimmedMean": "samestep.federated.aggregation",
    "Median": "samestep.federated.aggregation",
    "Masking": "samestep.federated.masking",
    "FixedPoint": "samestep.federated.fixed_point",
    "Privacy": "samestep.federated.privacy",
}
"""Where a name lives, if not among the errors."""
_ROOMS = ("codecs",)
"""Rooms whose names are used with theirs: samestep.codecs.Int8."""

__all__ = [
    "Adaptive",
    "Average",
    "BudgetError",
    "CheckpointError",
    "Clients",
    "DataError",
    "EditedWeightsError",
    "Federated",
    "FixedPoint",
    "IntegrityError",
    "Local",
    "Masking",
    "Median",
    "MismatchError",
    "Momentum",
    "Nesterov",
    "NonFiniteError",
    "NormBound",
    "PeerError",
    "Privacy",
    "Run",
    "SamestepError",
    "SettingsError",
    "Sites",
    "Stale",
    "Step",
    "Synchronous",
    "TrimmedMean",
    "UnmaskingError",
    "UsageError",
    "WeightedMean",
    "WorkerError",
    "launch",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"samestep.{name}")
    if name not in __all__:
        raise AttributeError(f"module 'samestep' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES.get(name, "samestep.errors")), name)


def __dir__() -> list[str]:
    return [*__all__, *_ROOMS]
