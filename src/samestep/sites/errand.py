"""What a site asks of the meeting place, step by step, until it has an answer, or knows that there is none now."""

from __future__ import annotations

import contextlib
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from samestep.errors import PeerError, SamestepError
from samestep.sites.visitor import Unreachable, Visitor
from samestep.storage import wire

Start = Callable[[], dict[str, Any]]

_TELL_SECONDS = 5.0
_PAUSE = 0.2
_AGAIN_SECONDS = 2.0
"""For which it is tried to reach a place that did not answer the last time."""


@dataclass(frozen=True)
class Told:
    """What the place answers.

    Attributes:
        round: rounds made.
        made: the round that a contribution counts in; -1: in none.
        last: number of the site's last contribution that the place knows of.
        training: what the weights belong to.
        buffers: after that round.
        weights: after that round, unless
        changes: of each round since the site had weights, encoded; and
        digest: of the weights that come of them.
    """

    round: int
    made: int
    last: int
    training: str
    buffers: torch.Tensor
    weights: Sequence[torch.Tensor] | None
    changes: Sequence[bytes] = ()
    digest: str = ""


class Errand:
    """One site's dialogue with the place; a Ctrl-C is heard while it waits."""

    def __init__(self, visitor: Visitor, site: str, terms: dict[str, Any], reach: float, stops: Callable[[], bool]):
        """Ask nothing yet.

        Args:
            visitor: the way.
            site: its name.
            terms: what it has set, and its shapes and dtypes.
            reach: seconds for which it is tried to reach the place.
            stops: whether the run is to end.
        """
        self._visitor = visitor
        self._site = site
        self._terms = terms
        self._reach = reach
        self._stops = stops
        self._is_lost = False
        self._has_joined = False
        self._life = secrets.token_hex(8)

    def join(self, start: Start) -> Told:
        """Take part.

        Args:
            start: gives weights and buffers, for the case that this site is the first.

        Raises:
            PeerError: there is no meeting place.
            MismatchError: the others have agreed on something else.
        """
        try:
            content = self._join(start, -1, 0)
        except Unreachable as error:
            raise PeerError(
                f"Site {self._site!r} found no meeting place: {error}. Start it (samestep meet HOST:PORT), or see that "
                f"this host can reach it."
            ) from error
        return _told(content)

    def give(self, frame: dict[str, Any], start: Start, known: tuple[int, int]) -> Told:
        """Give a contribution, and wait for what becomes of it.

        Args:
            frame: the contribution.
            start: see `join`, for the case that the place was lost and is another.
            known: rounds that the site knows of, and the number of its last contribution that was answered.

        Raises:
            Unreachable: there is no answer for now.
            MismatchError, NonFiniteError, PeerError: the place refuses it.
        """
        question = {"site": self._site, "sequence": frame["sequence"], "base": frame["base"]}
        since, has_told, is_given = time.monotonic(), False, False
        while True:
            if not self._has_joined:
                self._join(start, *known)
            status, content = self._ask(*(("/outcome", question) if is_given else ("/give", frame)))
            match status, is_given:
                case 200, True:
                    return _told(content)
                case 200, False:
                    is_given = True
                    continue
                case 404, _:
                    # It was started again from its disk, and knows nothing of the round that was open.
                    is_given = False
                case 410, _:
                    self._has_joined = is_given = False
            if self._stops():
                raise Unreachable("the run is to end")
            if not has_told and time.monotonic() - since > _TELL_SECONDS:
                has_told = True
                missing = content.get("missing", 0)
                words = f"{missing} more site{'s' * (missing != 1)}" if missing else "other sites"
                print(f"samestep: Site {self._site!r} waits for {words}.", file=sys.stderr, flush=True)
            if not is_given:
                time.sleep(_PAUSE)

    def newest(self, told: Told) -> Told:
        """Return the newest weights, where the changes that were told do not lead to them.

        Raises:
            Unreachable, PeerError: there is no answer.
        """
        status, content = self._ask("/newest", {"site": self._site})
        if status == 410:
            # It was started again meanwhile; what was given is given again.
            raise Unreachable("the meeting place has no weights any more")
        if status != 200:
            raise PeerError(f"The meeting place gives no weights ({status}): {content}")
        newest = _told(content)
        return replace(newest, made=told.made, last=told.last)

    def _join(self, start: Start, num_rounds: int, sequence: int) -> dict[str, Any]:
        frame: dict[str, Any] = {"site": self._site, "terms": self._terms, "start": None}
        frame |= {"round": num_rounds, "sequence": sequence}
        status, content = self._ask("/join", frame)
        if status == 202:
            status, content = self._ask("/join", {**frame, "start": start()})
        if status != 200:
            raise PeerError(f"The meeting place does not take site {self._site!r} ({status}): {content}")
        self._has_joined = True
        return content

    def leave(self, start: Start, known: tuple[int, int]) -> None:
        """Say that the run has come to its end; if nobody hears it, the others wait once more.

        Args:
            start, known: see `give`: only who speaks for the site can take leave for it, so this life joins first.
        """
        with contextlib.suppress(Unreachable, SamestepError):
            if not self._has_joined:
                self._join(start, *known)
            self._ask("/leave", {"site": self._site})

    def _ask(self, path: str, frame: dict[str, Any]) -> tuple[int, Any]:
        seconds = min(self._reach, _AGAIN_SECONDS) if self._is_lost else self._reach
        self._is_lost = True
        answer = self._visitor.ask(path, {**frame, "site": self._site, "life": self._life}, seconds)
        self._is_lost = False
        return answer


def _told(content: dict[str, Any]) -> Told:
    known = content["round"], content.get("made", -1), content.get("last", 0), content["training"]
    if "changes" in content:
        return Told(*known, content["buffers"], None, content["changes"], content["digest"])
    state = wire.unpack(content["state"])
    return Told(*known, state["buffers"], state["weights"])
