"""On which version of the weights each shard was played: recorded, and replayed.

An asynchronous run is a function of its recipe and of this schedule. As a file it is one line of JSON with what it
belongs to, and then one line for each update: for each replica, how many updates its weights lacked.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from samestep.errors import SettingsError

_FORMAT = "samestep schedule 1"


class Schedule:
    """The schedule of a run, as far as it is known.

    Attributes:
        lags: for each update, how many updates each replica's weights lacked; one byte each.
    """

    def __init__(self, num_replicas: int, bound: int, record: str | None, replay: str | None):
        """Begin with nothing known.

        Args:
            num_replicas: number of replicas.
            bound: of the staleness.
            record: file to write, or None.
            replay: file to go by, or None.

        Raises:
            SettingsError: the file to go by is none, or of another run; or the file to write cannot be written.
        """
        self.lags: list[bytes] = []
        self._head = {"format": _FORMAT, "replicas": num_replicas, "bound": bound}
        self._given = self._read(replay) if replay is not None else []
        self._path = record
        self.load([])

    def lag(self, number: int, replica: int) -> int | None:
        """Return the lag that is given for a shard of update `number`; None if it is free."""
        return self._given[number][replica] if number < len(self._given) else None

    def add(self, lags: Sequence[int]) -> None:
        """Take the lags of the next update."""
        self.lags.append(bytes(lags))
        self._write(self.lags[-1:])

    def load(self, lags: Sequence[bytes]) -> None:
        """Go on after updates with these lags."""
        self.lags = list(lags)
        self._write(self.lags, [self._head])

    def histogram(self) -> dict[int, int]:
        """Return the number of shards of each lag."""
        return dict(sorted(Counter(lag for lags in self.lags for lag in lags).items()))

    def _write(self, lags: Sequence[bytes], head: Sequence[Any] = ()) -> None:
        """Write lags behind what is there, or, with a head, all anew."""
        if self._path is None:
            return
        lines = [*head, *(list(one) for one in lags)]
        try:
            with open(self._path, "w" if head else "a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        except OSError as error:
            raise SettingsError(
                f"You set Stale(record={self._path!r}), which cannot be written: {error.strerror}."
            ) from error

    def _read(self, path: str) -> list[bytes]:
        try:
            head, *lines = Path(path).read_text("utf-8").splitlines()
            found = json.loads(head)
            lags = [bytes(json.loads(line)) for line in lines]
            is_whole = all(len(one) == found["replicas"] and max(one) <= found["bound"] for one in lags)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise SettingsError(
                f"You set Stale(replay={path!r}), which cannot be read as a schedule: {error}."
            ) from error
        if found != self._head or not is_whole:
            raise SettingsError(
                f"You set Stale(replay={path!r}), a schedule of {found}, and this run is {self._head}. Use the "
                f"recipe that it was recorded with."
            )
        return lags
