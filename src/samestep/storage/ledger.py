"""The ledger: the run's record of committed calls, in order. It is what a replay reads.

A run writes one entry for every call whose result steers the script (an update, an evaluation, a recorded result).
A replacement worker, or a resumed run, executes the script again from its first line and reads these results back
instead of computing them: same calls, in the same order, or an error that names both source lines.

Entries lie in three flat columns (about 100 bytes an entry), so that a million of them are no million objects, and a
checkpoint takes them as they are:

    site: which call on which line | end: where the frame ends in the log | log: frames of `wire.pack`, end to end
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from samestep.errors import CheckpointError, MismatchError
from samestep.storage import wire

_SPOKEN = {"update": "step.update"}
_ADVICE = (
    "A replay needs the script, its arguments and its data as they were. Restore them, or start anew in another folder."
)


class Entry(NamedTuple):
    """One committed call.

    Attributes:
        kind: "update", "mean", "gather", "once", "elapsed", ...: the method's name.
        where: the script's line that called it, "train.py:40".
        value: what it returned, or what the caller needs to build that again.
    """

    kind: str
    where: str
    value: Any


class Ledger:
    """Committed calls, in order, and how far a replay has come in them. A new one is empty and does not replay."""

    def __init__(self) -> None:
        self._sites: list[tuple[str, str]] = []
        self._site_codes: dict[tuple[str, str], int] = {}
        self._site_of = array("I")
        self._end_of = array("Q")
        self._log = bytearray()
        self._num_replayed = 0

    def __len__(self) -> int:
        return len(self._end_of)

    @property
    def replaying(self) -> bool:
        """Whether recorded calls are left that `next` has not returned yet."""
        return self._num_replayed < len(self._end_of)

    def append(self, kind: str, where: str, value: Any) -> None:
        """Record a committed call. Only while not replaying.

        `next` will return `value` as it comes back from `wire`: a NumPy number as a Python one, a tensor with memory
        of its own.

        Args:
            kind: name of the method called.
            where: source line of the call, "train.py:40".
            value: anything that `wire.pack` takes.

        Raises:
            TypeError: `value` cannot be packed; nothing is recorded then.
        """
        assert not self.replaying, "a call was recorded before the replay was over"
        frame = wire.pack(value)
        self._site_of.append(self._site_code((kind, where)))
        self._log += frame
        self._end_of.append(len(self._log))
        self._num_replayed += 1

    def next(self, kind: str, where: str) -> Any:
        """Return the recorded value of the next call. Only while replaying.

        Args:
            kind: name of the method that the script calls now.
            where: source line of the call. Only the kind must agree: lines move when a comment is added.

        Raises:
            MismatchError: another kind of call was recorded here.
        """
        assert self.replaying, "a call was replayed after the last recorded one"
        number = self._num_replayed
        if self._sites[self._site_of[number]][0] != kind:
            raise MismatchError(
                f"Call {number + 1} was {self._spoken(number)} when recorded, but now is {_spoken(kind, where)}: "
                f"the script or its data changed. {_ADVICE}"
            )
        value = self._value(number)
        self._num_replayed += 1
        return value

    def check_finished(self) -> None:
        """Check that a script which has ended made every recorded call.

        Raises:
            MismatchError: recorded calls are left.
        """
        if self.replaying:
            raise MismatchError(
                f"The script ended after {self._num_replayed} calls, but {len(self)} are recorded, the next one "
                f"{self._spoken(self._num_replayed)}: the script or its data changed. {_ADVICE}"
            )

    def entries(self) -> Iterator[Entry]:
        """Yield all entries, first to last. It does not move the replay."""
        for number in range(len(self)):
            kind, where = self._sites[self._site_of[number]]
            yield Entry(kind, where, self._value(number))

    def to_facts(self, first: int = 0) -> dict[str, Any]:
        """Return the entries from number `first` on, as a dict that `wire.pack` and a checkpoint take.

        Args:
            first: how many entries the reader already has.
        """
        start = self._start(first)
        ends = np.array(self._end_of[first:], dtype="<u8") - np.uint64(start)
        return {
            "sites": [list(site) for site in self._sites],
            "site_of": np.array(self._site_of[first:], dtype="<u4").tobytes(),
            "end_of": ends.astype("<u8").tobytes(),
            "log": bytes(self._log[start:]),
        }

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> Ledger:
        """Return the ledger that `to_facts()` described, about to replay its first entry.

        Raises:
            CheckpointError: these are no facts of a ledger.
        """
        ledger = cls()
        ledger.extend(facts)
        return ledger

    def extend(self, facts: dict[str, Any]) -> None:
        """Add the entries that `to_facts(first=len(ledger))` of another ledger described; they will be replayed.

        Raises:
            CheckpointError: these are no facts of a ledger; nothing is added then.
        """
        sites, site_of, end_of, log = _columns(facts)
        codes = np.array([self._site_code(site) for site in sites], dtype=np.uint64)
        start = len(self._log)
        self._log += log
        self._site_of.extend(codes[site_of].tolist())
        self._end_of.extend((end_of + np.uint64(start)).tolist())

    def go_on_in(self, longer: Ledger) -> Ledger:
        """Return `longer`, another record of the same run, to be replayed from where this one has come to."""
        longer._num_replayed = self._num_replayed
        return longer

    def _site_code(self, site: tuple[str, str]) -> int:
        code = self._site_codes.setdefault(site, len(self._sites))
        if code == len(self._sites):
            self._sites.append(site)
        return code

    def _start(self, number: int) -> int:
        return self._end_of[number - 1] if number else 0

    def _value(self, number: int) -> Any:
        try:
            return wire.unpack(bytes(self._log[self._start(number) : self._end_of[number]]))
        except (ValueError, ArithmeticError, AttributeError) as error:
            raise CheckpointError(f"Call {number + 1} of the run's ledger cannot be read: {error}") from error

    def _spoken(self, number: int) -> str:
        return _spoken(*self._sites[self._site_of[number]])


def _spoken(kind: str, where: str) -> str:
    return f"`{_SPOKEN.get(kind, f'run.{kind}')}` at {where}"


def _columns(facts: Any) -> tuple[list[tuple[str, str]], np.ndarray, np.ndarray, bytes]:
    """Return the sites, site numbers, ends and log that `to_facts` wrote, once they are seen to fit each other."""
    try:
        sites = [(kind, where) for kind, where in facts["sites"]]
        site_of = np.frombuffer(facts["site_of"], dtype="<u4").astype(np.int64)
        end_of = np.frombuffer(facts["end_of"], dtype="<u8").astype(np.uint64)
        log = facts["log"]
        problem = _problem(sites, site_of, end_of, log)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"The run's ledger cannot be read: {error!r}.") from error
    if problem:
        raise CheckpointError(f"The run's ledger cannot be read: {problem}.")
    return sites, site_of, end_of, log


def _problem(sites: list[tuple[str, str]], site_of: np.ndarray, end_of: np.ndarray, log: Any) -> str:
    if any(type(word) is not str for site in sites for word in site):
        return "a call's kind or place is not text"
    if type(log) is not bytes:
        return f"its log is of type {type(log).__name__}"
    if len(site_of) != len(end_of):
        return f"its columns hold {len(site_of)} and {len(end_of)} calls"
    if len(site_of) and int(site_of.max()) >= len(sites):
        return "a call has a place that is not listed"
    if (end_of[1:] <= end_of[:-1]).any() or (len(end_of) and end_of[0] == 0):
        return "its calls overlap"
    end = int(end_of[-1]) if len(end_of) else 0
    return "" if end == len(log) else f"its log has {len(log)} bytes, not {end}"
