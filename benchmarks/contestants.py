"""Who takes part in the comparison: each is a command that prints JSON lines, run alone and in turn."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TIMEOUT_SECONDS = 600
_TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One way of running a script of this folder.

    Attributes:
        title: for tables.
        before: the command up to the script.
        script: file name.
        options: what follows the script.
        threads: OpenMP threads of each process.
        writes_summary: whether `{summary}` in the command is a file that samestep writes.
    """

    title: str
    before: tuple[str, ...]
    script: str
    options: tuple[str, ...] = ()
    threads: int = 1
    writes_summary: bool = False

    def run(self, *arguments: str) -> dict[str, Any]:
        """Run it once.

        Returns:
            The facts of the first process, with `first_step_seconds` counted from the start of the command, and
            `pss_bytes` of all its workers.

        Raises:
            RuntimeError: the command failed; the message holds what it said.
        """
        with tempfile.TemporaryDirectory() as folder:
            summary = Path(folder) / "summary.json"
            command = [*self.before, str(HERE / self.script), *self.options, *arguments]
            begin = time.monotonic()
            lines = _json_lines([part.replace("{summary}", str(summary)) for part in command], self.threads)
            facts = dict(next(line for line in lines if line.get("rank", 0) == 0))
            facts["pss_bytes"] = sum(line.get("pss_bytes", 0) for line in lines)
            if self.writes_summary:
                told = json.loads(summary.read_text())
                facts["pss_bytes"] = told["peak_memory_bytes"]
                facts["state_bytes"] = told["state_bytes"]
                facts |= {name: told[name] for name in ("updates", "updates_verified", "verify_seconds")}
        if "first_step_at" in facts:
            facts["first_step_seconds"] = facts["first_step_at"] - begin
        return facts


def samestep_run(title: str, num_workers: int, replicas: int | str) -> Contestant:
    """Return `samestep run` with so many workers and replicas."""
    shape = ("--workers", str(num_workers), "--replicas", str(replicas), "--summary", "{summary}")
    return Contestant(
        title=title,
        before=(sys.executable, "-m", "samestep", "run", *shape),
        script="train_samestep.py",
        options=("--",),
        writes_summary=True,
    )


def samestep_script(title: str) -> Contestant:
    """Return `python script.py`, which starts workers of its own: one per core."""
    return Contestant(title=title, before=(sys.executable,), script="train_samestep.py")


def ddp(title: str, num_workers: int) -> Contestant:
    """Return plain DistributedDataParallel over gloo, started by torchrun."""
    return Contestant(
        title=title,
        before=(*_TORCHRUN, "--nproc-per-node", str(num_workers)),
        script="train_plain.py",
        # Its faster setting: gradients are not copied into the buckets.
        options=("--bucket-view",),
    )


def one_process(title: str, num_threads: int) -> Contestant:
    """Return the plain loop in one process."""
    return Contestant(
        title=title,
        before=(sys.executable,),
        script="train_plain.py",
        options=("--threads", str(num_threads)),
        threads=num_threads,
    )


def reduce_in_arena(num_workers: int) -> Contestant:
    """Return the arena's reduce and update alone."""
    return Contestant(
        title="arena", before=(sys.executable,), script="reduce.py", options=("--workers", str(num_workers))
    )


def reduce_with_gloo(num_workers: int) -> Contestant:
    """Return gloo's all-reduce, and a replicated update, alone."""
    before = (*_TORCHRUN, "--nproc-per-node", str(num_workers))
    return Contestant(title="gloo", before=before, script="reduce.py", options=("--gloo",))


def _json_lines(command: Sequence[str], num_threads: int) -> list[dict[str, Any]]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads), "MKL_NUM_THREADS": str(num_threads)}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=TIMEOUT_SECONDS)
    except BaseException:
        # torchrun ends its processes when it is asked to, not when it is killed.
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        raise
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    if process.returncode or not lines:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {process.returncode}:\n{out}\n{err}")
    return lines
