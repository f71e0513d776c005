"""The tree of errors. Each message says what was set, what it clashes with, and what to do."""

from __future__ import annotations


class SamestepError(Exception):
    """Base of every error that samestep raises on purpose."""


class SettingsError(SamestepError, ValueError):
    """Settings that clash with each other or with the machine."""


class UsageError(SamestepError, RuntimeError):
    """The training loop used the API in an order that cannot work."""


class DataError(SamestepError, RuntimeError):
    """A data source, sample or collate function failed."""


class NonFiniteError(SamestepError, ArithmeticError):
    """A loss or gradient is NaN or infinite."""


class MismatchError(SamestepError, RuntimeError):
    """Workers, or a run and its checkpoint, do not hold the same thing."""


class EditedWeightsError(SamestepError, RuntimeError):
    """Weights were changed outside `update` and outside `run.edit()`."""


class IntegrityError(SamestepError, RuntimeError):
    """Memory that must not change has changed (a flipped bit, a stray write), or a worker has computed wrong."""


class CheckpointError(SamestepError, RuntimeError):
    """A checkpoint could not be written, read or verified."""


class StorageError(CheckpointError):
    """A checkpoint failed because of where it lies, not of what it holds: a disk that is full, failing, read-only.

    Attributes:
        reason: the fault alone, without the names of files, so that the same fault reads the same at every step.
    """

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


class WorkerError(SamestepError, RuntimeError):
    """A worker of the run failed; the message holds its own error."""


class PeerError(SamestepError, ConnectionError):
    """Another worker is gone, so this one cannot go on. Never the first cause."""


class UnmaskingError(SamestepError, RuntimeError):
    """Too few clients of a federated round are left to remove the masks from their sum; nothing of it is known."""


class BudgetError(SamestepError, RuntimeError):
    """The privacy budget is spent: one more round would tell more about a client than was allowed."""
