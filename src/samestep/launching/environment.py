"""What is read from, and set in, the environment of processes, and in no other room but the outermost."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

from samestep.core.worker import Worker
from samestep.errors import SettingsError

_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR")


def prepare(environment: MutableMapping[str, str] | None = None) -> None:
    """Set what must be set before a zygote imports torch.

    A pool of threads would not survive the fork, so each library starts with one thread; workers raise torch's own
    number afterwards. MKL's results depend on the alignment of operands unless MKL_CBWR is set before its first call.

    Args:
        environment: the one to change; default this process's.
    """
    variables = environment if environment is not None else os.environ
    for name in _ONE_THREAD:
        variables[name] = "1"
    variables.setdefault("MKL_CBWR", "AUTO")


def prepare_running() -> None:
    """Set what still has an effect in a process that has imported torch already."""
    os.environ.setdefault("MKL_CBWR", "AUTO")


def for_zygote() -> dict[str, str]:
    """Return a copy of this process's environment, prepared for a zygote."""
    variables = dict(os.environ)
    prepare(variables)
    return variables


def num_cores() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0))


def device_kind() -> str:
    """Return what SAMESTEP_DEVICE asks for, "cpu" if nothing."""
    return os.environ.get("SAMESTEP_DEVICE") or "cpu"


def has_launcher() -> bool:
    """Whether torchrun, or a launcher that sets the same variables, started this process as one rank of a run."""
    return all(os.environ.get(name) for name in _LAUNCHER)


def launched_worker() -> Worker:
    """Return the facts of this process as the launcher gave them; its device is left at "cpu".

    Raises:
        SettingsError: they are not numbers, or do not fit together.
    """
    rank, size = _number("RANK"), _number("WORLD_SIZE")
    local_rank = _number("LOCAL_RANK") if os.environ.get("LOCAL_RANK") else 0
    if not 0 <= rank < size:
        raise SettingsError(f"The launcher set RANK={rank} and WORLD_SIZE={size}; a rank lies in 0..WORLD_SIZE-1.")
    return Worker(rank=rank, size=size, local_rank=local_rank)


def num_local_workers() -> int:
    """Return how many workers the launcher started on this host, as far as it tells."""
    return _number("LOCAL_WORLD_SIZE") if os.environ.get("LOCAL_WORLD_SIZE") else 1


def _number(name: str) -> int:
    text = os.environ[name]
    if not text.isdecimal():
        raise SettingsError(f"The launcher set {name}={text!r}, which is not a whole number. Unset it, or mend it.")
    return int(text)
