"""Who contributes to which round. Pure: no I/O, no clock, no tensors.

A site gives what it learned since the last answer, numbered by the last of its updates that are in it. A round is made
once `quorum` sites have given (fewer by those that have come to their end), and all that are present have, or
`patience` seconds have passed since. A contribution that comes later counts in the next round (buffered asynchronous
aggregation: Nguyen et al. 2022); one that is measured from weights more than `bound` rounds old counts in none. Whoever
asks again, for whatever reason, is answered as before: what has been given under a number counts once.

A run has a life each time that it is started, or starts again after a fault; the last one that has joined under a
site's name speaks for the site.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Any


@dataclass(frozen=True)
class Gift:
    """A contribution.

    Attributes:
        site: its name.
        sequence: the site's last update that is in it; a later contribution has a larger number.
        first: the site's last update before it.
        base: number of rounds that had been made when the site got the weights that it is measured from.
        items: samples that the site learned from.
        life: of its run.
        made: the round that it counts in, once that is made; -1: it counts in none; 0: in one that is forgotten.
    """

    site: str
    sequence: int
    first: int
    base: int
    items: float
    life: str
    made: int | None = None


class Answer(Enum):
    """What becomes of a contribution that is given."""

    TAKEN = "taken"
    KNOWN = "known"
    LATER = "later"
    """The site's contribution before is not over: give it again when that is."""
    TOO_OLD = "too old"
    OVERLAPS = "overlaps"
    """Some of its updates count already, from an earlier life of the run; they cannot be told apart from the others."""
    OTHER = "other"
    """Another run has joined under this name since."""


class Table:
    """The rounds of one training.

    Attributes:
        num_rounds: how many are made.
        open: contributions to the next one, by site.
        last: the last contribution of each site that is over.
        present: sites that the next round waits for.
        ended: sites that have taken leave.
        lives: who speaks for each site.
    """

    def __init__(self, quorum: int, patience: float, bound: int):
        """Begin before the first round.

        Args:
            quorum: sites that a round needs.
            patience: seconds for which it waits for others after that.
            bound: rounds that the weights of a contribution may be old.
        """
        self._quorum = quorum
        self._patience = patience
        self._bound = bound
        self._full_since: float | None = None
        self.num_rounds = 0
        self.open: dict[str, Gift] = {}
        self.last: dict[str, Gift] = {}
        self.present: set[str] = set()
        self.ended: set[str] = set()
        self.lives: dict[str, str] = {}

    @property
    def needed(self) -> int:
        """Contributions without which there is no round."""
        return max(1, self._quorum - len(self.ended))

    def join(self, site: str, life: str) -> int:
        """Wait for a site from now on; return the number of its last contribution."""
        self.lives[site] = life
        self.present.add(site)
        self.ended.discard(site)
        return self.known(site)

    def known(self, site: str) -> int:
        """Return the number of a site's last contribution, 0 if there is none."""
        last = self.open.get(site) or self.last.get(site)
        return last.sequence if last is not None else 0

    def leave(self, site: str, life: str) -> None:
        """Wait for a site no more, if this is its run: it has come to its end, and nothing that it gave is open."""
        if self.lives.get(site, life) != life:
            return
        self.present.discard(site)
        self.ended.add(site)

    def give(self, gift: Gift, is_foreign: bool = False) -> Answer:
        """Take a contribution.

        Args:
            gift: what is given.
            is_foreign: it is measured from weights of another training.

        Raises:
            KeyError: the site has not joined.
        """
        if gift.life != self.lives[gift.site]:
            return Answer.OTHER
        self.present.add(gift.site)
        self.ended.discard(gift.site)
        known = self.open.get(gift.site) or self.last.get(gift.site)
        if known is not None and gift.sequence <= known.sequence:
            return Answer.KNOWN
        if gift.site in self.open:
            # The site was started anew, and does not know of it.
            return Answer.LATER
        is_older = is_foreign or gift.base < self.num_rounds - self._bound
        if is_older or gift.first < self.known(gift.site):
            self.last[gift.site] = replace(gift, made=-1)
            return Answer.TOO_OLD if is_older else Answer.OVERLAPS
        self.open[gift.site] = gift
        return Answer.TAKEN

    def due(self, now: float) -> float | None:
        """Return seconds until the next round is to be made, 0 if it is now, None if it wants more contributions.

        Args:
            now: seconds of any clock that never goes back. Call it whenever something has changed.
        """
        if len(self.open) < self.needed:
            self._full_since = None
            return None
        if self._full_since is None:
            self._full_since = now
        if self.present <= set(self.open):
            return 0.0
        return max(0.0, self._full_since + self._patience - now)

    def close(self, is_void: bool = False) -> list[Gift]:
        """Make the round; return its contributions, sorted by site. Nobody waits any more for who gave none.

        Args:
            is_void: it cannot be made of them, so that they count in none.
        """
        gifts = [self.open[site] for site in sorted(self.open)]
        self.num_rounds += not is_void
        made = -1 if is_void else self.num_rounds
        self.last.update({gift.site: replace(gift, made=made) for gift in gifts})
        self.present = set(self.open)
        self.open = {}
        self._full_since = None
        return gifts

    def missing(self) -> int:
        """Return how many more sites the next round needs."""
        return max(0, self.needed - len(self.open))

    def made(self, site: str, sequence: int) -> int | None:
        """Return the round in which a contribution counts (see `Gift.made`), or None if that is not known yet.

        Raises:
            KeyError: it was never given.
        """
        gift = self.open.get(site)
        if gift is not None and gift.sequence >= sequence:
            return None if gift.sequence == sequence else 0
        gift = self.last.get(site)
        if gift is None or gift.sequence < sequence:
            raise KeyError(sequence)
        return gift.made if gift.sequence == sequence else 0

    def to_values(self) -> dict[str, Any]:
        """Return plain values of the rounds that are made; what is open is given again by the sites."""
        last = [[g.site, g.sequence, g.first, g.base, g.items, g.life, g.made] for g in self.last.values()]
        return {"rounds": self.num_rounds, "last": last, "ended": sorted(self.ended)}

    def load(self, values: dict[str, Any]) -> None:
        """Take what `to_values` gave."""
        self.num_rounds = values["rounds"]
        self.last = {site: Gift(site, *rest) for site, *rest in values["last"]}
        self.ended = set(values["ended"])
