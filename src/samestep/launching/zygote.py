"""The process that imports everything once, with one thread, and forks workers in milliseconds.

It runs no operation and touches no GPU: what a library starts lazily (thread pools, contexts) would not survive a fork.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable

from samestep.errors import SettingsError
from samestep.launching.context import WorkerContext, enter
from samestep.launching.failure import SETTINGS_CODE, Failure
from samestep.launching.orders import Orders

WARM = ("numpy", "torch", "torch.distributed", "torch._dynamo")
"""Imported before forking. The first optimizer that is built imports torch._dynamo, half of torch's own start."""

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

Body = Callable[[WorkerContext], None]
"""What a worker does with its life."""


def warm(modules: tuple[str, ...] = WARM) -> None:
    """Import what every worker needs."""
    for name in modules:
        importlib.import_module(name)


def check_one_task() -> None:
    """Refuse to fork from a process that has more than one thread.

    Raises:
        SettingsError: there are others; a fork would copy their locks, but not them.
    """
    tasks = os.listdir("/proc/self/task")
    if len(tasks) == 1:
        return
    names = sorted(_name_of_task(task) for task in tasks if task != str(os.getpid()))
    raise SettingsError(
        f"The process that forks workers must have one thread, but has {len(tasks)}; the others are called "
        f"{', '.join(names)}. An import started them: look for a .pth or sitecustomize file that imports libraries, "
        "or a tracer that is set in the environment."
    )


def die_with(parent: int) -> None:
    """Let the kernel kill this process as soon as its parent is gone.

    Args:
        parent: pid that the parent should have; if it is gone already, this process ends here.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def adopt_orphans() -> None:
    """Become the parent of what workers leave behind, so that it can be ended."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def fork_worker(context: WorkerContext, body: Body, prepare: Callable[[], None]) -> int:
    """Fork one worker.

    Args:
        context: what it knows of itself.
        body: what it does.
        prepare: called first in the worker: output, descriptors.

    Returns:
        Its pid.
    """
    supervisor = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        die_with(supervisor)
        prepare()
        code = _live(context, body)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def freeze() -> None:
    """Keep the collector of workers away from what the zygote imported, so those pages stay shared."""
    sys.stdout.flush()
    sys.stderr.flush()
    gc.freeze()


def _live(context: WorkerContext, body: Body) -> int:
    """Run the body, tell the supervisor how it ended, and end as Python would. Returns the exit code."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, _end_if_ordered(context.orders) if context.orders is not None else signal.SIG_DFL)
    # A terminal sends Ctrl-C, and that it closes, to every process; the supervisor decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    context.known = frozenset(sys.modules)
    enter(context)
    try:
        code = _outcome(context, body)
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    except OSError:
        return 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
    return code


def _end_if_ordered(orders: Orders) -> Callable[[int, object], None]:
    """Return what a worker does at SIGTERM: end if its supervisor sent it. A child that it forked ends always."""
    worker = os.getpid()

    def end(number: int, _: object) -> None:
        if orders.is_ending or os.getpid() != worker:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    return end


def _outcome(context: WorkerContext, body: Body) -> int:
    try:
        body(context)
    except SystemExit as leaving:
        code, message = _exit_code(leaving)
        context.sender.send("exit", {"code": code, "message": message, "inside": context.is_playing})
        return code
    except BaseException as error:
        code = SETTINGS_CODE if isinstance(error, SettingsError) and not context.is_playing else 1
        context.sender.send("error", Failure.of(error, context.rank, code).to_dict())
        return 1
    context.sender.send("done")
    return 0


def _exit_code(leaving: SystemExit) -> tuple[int, str]:
    """What `sys.exit` was given, as a shell would see it: a number, or a message and 1."""
    if leaving.code is None:
        return 0, ""
    if isinstance(leaving.code, int):
        return leaving.code & 0xFF, ""
    return 1, str(leaving.code)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl: {os.strerror(number)}")


def _name_of_task(task: str) -> str:
    try:
        with open(f"/proc/self/task/{task}/comm") as file:
            return file.read().strip()
    except OSError:
        return task
