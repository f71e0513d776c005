"""Loading: requests in, shards out, in order; read when they are asked for, or ahead in loader processes.

    requests --next--> ask loader 0, 1, .. k-1, 0, 1, ..      up to `_AHEAD` requests per loader are under way
    shards  <--yield-- answer of loader 0, 1, .. k-1, 0, ..   so answers come in the order of the requests

A shard is the same bits either way. Errors too come in order: a sample that fails ahead is reported when its step is
reached.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable

from samestep.data.loader import Loader
from samestep.data.shard import Request, Shard, shards_of
from samestep.data.source import SeedSample, Source
from samestep.errors import SettingsError

__all__ = ["Request", "Shard", "load"]

_AHEAD = 2


def load(
    source: Source,
    requests: Iterable[Request],
    *,
    loaders: int = 0,
    seed: int,
    seed_sample: SeedSample,
    skip_bad: bool = False,
) -> Generator[list[Shard | None], None, None]:
    """Return an iterator over the shards of each request, lazily; an empty shard is None.

    It is a generator: its `close()` ends the loader processes at once. Without loaders, user code in the source runs
    in this process and moves the global random generators: seed them before what follows.

    Args:
        source: where samples come from.
        requests: what to read, in order; may be endless. Read ahead by two requests per loader.
        loaders: number of loader processes; 0 reads in this process, when asked.
        seed: the run's seed.
        seed_sample: seeds the global generators from (seed, epoch, sample id).
        skip_bad: leave out samples that cannot be read; their shards tell which.

    Raises:
        SettingsError: `loaders` is not a whole number, 0 or more.
        DataError: while iterating; a sample, the collate function or a loader process failed.
    """
    if not isinstance(loaders, int) or isinstance(loaders, bool) or loaders < 0:
        raise SettingsError(f"You set loaders={loaders!r}; it must be a number of processes, 0 (read in line) or more.")
    if loaders == 0:
        return (shards_of(request, source, seed, seed_sample, skip_bad) for request in requests)
    return _ahead(requests, loaders, lambda: Loader(source, seed, seed_sample, skip_bad))


def _ahead(
    requests: Iterable[Request], num_loaders: int, make_loader: Callable[[], Loader]
) -> Generator[list[Shard | None], None, None]:
    upcoming = _Upcoming(requests)
    loaders: list[Loader] = []
    under_way: deque[Loader] = deque()

    def fill() -> None:
        while len(under_way) < _AHEAD * num_loaders and (request := upcoming.next()) is not None:
            loader = loaders[upcoming.num_taken % num_loaders]
            loader.ask(request)
            under_way.append(loader)

    try:
        for _ in range(num_loaders):
            loaders.append(make_loader())
        fill()
        while under_way:
            shards = under_way.popleft().answer()
            fill()
            yield shards
        upcoming.raise_failure()
    finally:
        for loader in loaders:
            loader.kill()
        for loader in loaders:
            loader.close()


class _Upcoming:
    """Requests not yet asked for. An error in making one is kept until those before it have been answered."""

    def __init__(self, requests: Iterable[Request]):
        self._requests = iter(requests)
        self._failure: Exception | None = None
        self.num_taken = 0

    def next(self) -> Request | None:
        """Return the next request; None at the end, or once one could not be made."""
        if self._failure is not None:
            return None
        try:
            request = next(self._requests, None)
        except Exception as error:
            self._failure = error
            return None
        self.num_taken += request is not None
        return request

    def raise_failure(self) -> None:
        """Raise the error that ended the requests, if one did."""
        if self._failure is not None:
            raise self._failure
