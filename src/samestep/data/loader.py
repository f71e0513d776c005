"""One loader process: it fetches shards ahead of their use, in the order in which it was asked.

[Note: why not torch's DataLoader]
Measured with torch 2.13: closing a DataLoader while its workers are inside a slow sample takes 5 s per worker and
leaves folders in /tmp; killing its workers first may hang its shutdown; a batch that cannot be pickled hangs the
reader for good; workers outlive a killed parent by up to 5 s; a worker's death is raised by a signal handler in
whatever line the trainer is at; and batches pass through named shared memory. Here a loader is a forked child on one
private connection: its death is an end of file where its answer was due, and closing it is one signal.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import traceback
import warnings
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np
import torch

from samestep.data.parcel import receive, send
from samestep.data.shard import Request, Shard, shards_of
from samestep.data.source import SeedSample, Source, named
from samestep.errors import DataError

_PR_SET_PDEATHSIG = 1
_MAX_IN_MESSAGE = 32 * 1024
_GONE = (EOFError, BrokenPipeError, ConnectionResetError)


class LoaderTraceback(Exception):
    """The traceback of user code that failed in a loader process, as text."""

    def __str__(self) -> str:
        return f"\n\n(in a loader process)\n{self.args[0]}"


@dataclass(frozen=True, slots=True)
class _Failure:
    """An error on its way to the worker: exceptions themselves may not survive the journey."""

    message: str
    traceback: str


class Loader:
    """The worker's handle of a loader process. `close` it.

    The process is forked, so the source needs no copy. It ignores Ctrl-C (the worker decides what ends) and is killed
    by the kernel when the worker dies.
    """

    def __init__(self, source: Source, seed: int, seed_sample: SeedSample, skip_bad: bool = False):
        self._owner = os.getpid()
        self._asked: deque[Request] = deque()
        context = multiprocessing.get_context("fork")
        self._connection, far_end = context.Pipe()
        self._process = context.Process(
            target=_serve,
            args=(far_end, source, self._owner, seed, seed_sample, skip_bad),
            daemon=True,
            name="samestep-loader",
        )
        try:
            with warnings.catch_warnings():
                # Python 3.12 warns where the worker has other threads. The child runs none of their code.
                warnings.simplefilter("ignore", DeprecationWarning)
                self._process.start()
        finally:
            # Only the child may hold the far end: its death must read as an end of file.
            far_end.close()

    def ask(self, request: Request) -> None:
        """Ask for the shards of a request. Does not wait."""
        self._asked.append(request)
        # Where the process is gone, the error is raised where its answer is due, as it is without loaders.
        with suppress(*_GONE):
            send(self._connection, _message_of(request))

    def answer(self) -> list[Shard | None]:
        """Wait for the shards of the oldest request that was not answered yet.

        Raises:
            DataError: a sample or the collate function failed, a batch cannot be sent, or the process died.
        """
        request = self._asked.popleft()
        try:
            answer = receive(self._connection)
        except _GONE as error:
            raise DataError(self._death(request)) from error
        except Exception as error:
            raise DataError(_not_sent(request, error)) from error
        if isinstance(answer, _Failure):
            raise DataError(answer.message) from LoaderTraceback(answer.traceback)
        return answer

    def has_answer(self, seconds: float) -> bool:
        """Wait until an answer begins to arrive, or the process is gone; return whether it did so in time."""
        return self._connection.poll(max(0.0, seconds))

    def kill(self) -> None:
        """End the process at once, whatever it does. Does not wait."""
        if os.getpid() == self._owner:
            self._process.kill()

    def close(self) -> None:
        """End the process and wait until it is gone."""
        self._connection.close()
        if os.getpid() == self._owner:
            self._process.kill()
            self._process.join()
            self._process.close()

    def _death(self, request: Request) -> str:
        self._process.join(timeout=1)  # A thread of user code may keep it alive.
        code = self._process.exitcode or 0
        how = (
            f"was killed by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"ended with exit code {code}"
        )
        return (
            f"A loader process {how} when it should have read {_named_ids(request)}. Signal 9 is often the machine "
            f"running out of memory: use fewer loaders. Another signal or an exit code points to the code that reads "
            f"samples; loaders=0 runs it in the worker."
        )


def _message_of(request: Request) -> tuple[int, list[int], np.ndarray | torch.Tensor]:
    """Return a request as epoch, sizes of its shards, and all ids: in the message if few, else beside it.

    So a request never fills the pipe, and asking never waits for a loader that waits to answer.
    """
    ids = _all_ids(request)
    sizes = [one.size for one in request.ids]
    return request.epoch, sizes, ids if ids.nbytes <= _MAX_IN_MESSAGE else torch.from_numpy(ids)


def _request_of(message: tuple[int, list[int], np.ndarray | torch.Tensor]) -> Request:
    epoch, sizes, ids = message
    return Request(epoch, tuple(np.split(np.asarray(ids), np.cumsum(sizes)[:-1])) if sizes else ())


def _all_ids(request: Request) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype=np.int64), *request.ids])


def _serve(
    connection: Connection, source: Source, owner: int, seed: int, seed_sample: SeedSample, skip_bad: bool
) -> None:
    _die_with(owner)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    while True:
        try:
            request = _request_of(receive(connection))
        except _GONE:
            return
        try:
            send(connection, shards_of(request, source, seed, seed_sample, skip_bad))
        except _GONE:
            return
        except DataError as error:
            send(connection, _Failure(str(error), _traceback_of(error.__cause__ or error)))
        except Exception as error:
            send(connection, _Failure(_not_sent(request, error), _traceback_of(error)))


def _die_with(owner: int) -> None:
    """Let the kernel kill this process when the worker that forked it is gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != owner:
        os._exit(1)


def _traceback_of(error: BaseException) -> str:
    """Return the traceback without its first frame, which is ours."""
    frames = error.__traceback__
    return "".join(traceback.format_exception(type(error), error, frames.tb_next if frames else None))


def _not_sent(request: Request, error: Exception) -> str:
    return (
        f"The batch of {_named_ids(request)} could not be read and handed over by a loader process: "
        f"{type(error).__name__}: {error}. A batch must consist of tensors and of what Python can pickle; or use "
        f"loaders=0."
    )


def _named_ids(request: Request) -> str:
    return named(_all_ids(request).tolist())
