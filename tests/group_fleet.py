"""Plays test programs on fleets of worker processes. Run as a script by the `fleet` fixture in conftest.py.

It imports torch once, stays single-threaded, and forks a fresh fleet for every request, so a test costs milliseconds
and pytest's own process, which has threads, is never forked. One request per line of standard input, one answer per
line of standard output, both JSON:

    {"file", "program", "kind", "size", "arguments", "limit_seconds"}   ->   [outcome of rank 0, of rank 1, ...]

An outcome has one of "returned", "raised" (class names), "exit" (status; negative for a signal) or "hung", and "left":
the descriptors and threads that were still there after the group was closed.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.util
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from types import ModuleType, SimpleNamespace

# Imported before the fork, so that no worker pays for it. The first optimizer imports torch._dynamo, which keeps the
# process group for good if there is one by then.
import torch._dynamo
import torch.distributed  # noqa: F401

from samestep.core.arena import Arena, Handles
from samestep.core.process_group import ProcessGroup
from samestep.core.worker import Worker

_PDEATHSIG = 1
_modules: dict[str, ModuleType] = {}


def open_group(kind: str, worker: Worker, meeting: str, handles: Handles | None):
    """Return the group of one worker, or for the kind "bare" just what is needed to make one."""
    if kind == "bare":
        return SimpleNamespace(worker=worker, meeting=meeting, close=lambda: None)
    if handles is not None:
        return Arena(worker, handles)
    return ProcessGroup.join(worker, init_method=meeting, timeout_seconds=60, staged=kind == "gloo-staged")


def held() -> set[str]:
    """Return the descriptors and threads of this process."""
    descriptors = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the descriptor of the listing itself
            descriptors.add(f"descriptor {number} {os.readlink(f'/proc/self/fd/{number}')}")
    return descriptors | {f"thread {number}" for number in os.listdir("/proc/self/task")}


def outcome_of(request: dict, worker: Worker, meeting: str, handles: Handles | None) -> dict:
    """Play the program as one worker."""
    program = getattr(module_of(request["file"]), request["program"])
    before = held()
    group = None
    try:
        group = open_group(request["kind"], worker, meeting, handles)
        outcome = {"returned": program(group, **request["arguments"])}
    except Exception as error:
        outcome = {
            "raised": [c.__name__ for c in type(error).__mro__],
            "message": str(error),
            "traceback": traceback.format_exc(),
        }
    if group is not None:
        group.close()
    gc.collect()
    # The group itself still exists: closing it must be enough. A joined thread may be listed for a moment.
    deadline = time.monotonic() + 10
    while (left := held() - before) and time.monotonic() < deadline:
        time.sleep(0.01)
    return outcome | {"left": sorted(left)}


def module_of(file: str) -> ModuleType:
    """Import the file of a test, once."""
    if file not in _modules:
        spec = importlib.util.spec_from_file_location(f"programs_{len(_modules)}", file)
        _modules[file] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(_modules[file])
    return _modules[file]


def start_worker(request: dict, rank: int, meeting: str, handles: Handles | None) -> tuple[int, int]:
    """Fork one worker; return its process id and the descriptor from which its outcome is read."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    status = 1
    try:
        os.close(reading)
        ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL)
        worker = Worker(rank=rank, size=request["size"], local_rank=rank)
        text = json.dumps(outcome_of(request, worker, meeting, handles)).encode()
        while text:
            text = text[os.write(writing, text) :]
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def supervise(workers: list[tuple[int, int]], handles: Handles | None, limit_seconds: float) -> list[dict]:
    """Collect the outcomes. The first worker that fails makes the arena abort, as the launcher would."""
    texts = {reading: b"" for _, reading in workers}
    outcomes: dict[int, dict] = {}
    pids = {reading: pid for pid, reading in workers}
    deadline = time.monotonic() + limit_seconds
    while pids:
        ready, _, _ = select.select(list(pids), [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            for reading, pid in pids.items():
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                outcomes[reading] = {"hung": True, "left": []}
            break
        for reading in ready:
            chunk = os.read(reading, 1 << 16)
            texts[reading] += chunk
            if chunk:
                continue
            status = os.waitstatus_to_exitcode(os.waitpid(pids.pop(reading), 0)[1])
            outcomes[reading] = json.loads(texts[reading]) if status == 0 else {"exit": status, "left": []}
            if "returned" not in outcomes[reading] and handles is not None:
                handles.abort()
    for _, reading in workers:
        os.close(reading)
    return [outcomes[reading] for _, reading in workers]


def answer(request: dict) -> list[dict]:
    """Play one request."""
    module_of(request["file"])
    gc.freeze()  # else a worker's first collection copies every page of what it was forked with
    folder = tempfile.mkdtemp(prefix="samestep-test-")
    handles = Handles.create(request["size"]) if request["kind"] == "arena" else None
    try:
        meeting = f"file://{folder}/meeting"
        workers = [start_worker(request, rank, meeting, handles) for rank in range(request["size"])]
        return supervise(workers, handles, request["limit_seconds"])
    finally:
        if handles is not None:
            handles.close()
        shutil.rmtree(folder)


def main() -> None:
    # What workers or libraries print must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        num_threads = len(os.listdir("/proc/self/task"))
        if num_threads != 1:
            sys.exit(f"The fleet's parent has {num_threads} threads; it must not fork.")
        answers.write(json.dumps(answer(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
