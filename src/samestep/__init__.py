"""Data-parallel training whose result does not depend on the machines.

Names are imported when they are first used, so `import samestep` costs nothing and does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from samestep.agree.stale import Stale
    from samestep.agree.synchronous import Synchronous
    from samestep.errors import (
        CheckpointError,
        DataError,
        EditedWeightsError,
        IntegrityError,
        MismatchError,
        NonFiniteError,
        PeerError,
        SamestepError,
        SettingsError,
        UsageError,
        WorkerError,
    )
    from samestep.loop.run import Run
    from samestep.loop.step import Step
    from samestep.settings import launch

_HOMES = {
    "launch": "samestep.settings",
    "Run": "samestep.loop.run",
    "Step": "samestep.loop.step",
    "Stale": "samestep.agree.stale",
    "Synchronous": "samestep.agree.synchronous",
}
"""Where a name lives, if not among the errors."""

__all__ = [
    "CheckpointError",
    "DataError",
    "EditedWeightsError",
    "IntegrityError",
    "MismatchError",
    "NonFiniteError",
    "PeerError",
    "Run",
    "SamestepError",
    "SettingsError",
    "Stale",
    "Step",
    "Synchronous",
    "UsageError",
    "WorkerError",
    "launch",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'samestep' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES.get(name, "samestep.errors")), name)


def __dir__() -> list[str]:
    return [*__all__]
