"""Where the traces of runs with different numbers of workers part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Trace = Sequence[Mapping[str, Any]]
"""One frame per committed step: step, loss, tensors (name to digest)."""

SUSPECTS = (
    "operations whose order of additions changes from call to call: atomics in scatter or index_add, and more "
    "threads inside an operation than the recipe says (torch.set_num_threads)",
    "code that depends on time: clocks, time limits, schedules by the hour (run.elapsed is the same on all workers)",
    "randomness that is not seeded per step: a generator of your own, os.urandom, uuid, hash() of text",
    "code that depends on run.worker, on the process id, or on the environment",
    "state outside of what was replicated that shards change: a cache, a running average in a Python variable",
)
"""What makes results depend on the number of workers, likeliest first."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The first point at which a trace differs from that of the first count.

    Attributes:
        workers: number of workers of the trace that differs.
        against: number of workers that it was compared with.
        step: the step; None if nothing differs but the number of steps.
        tensors: names that differ at that step, in the trace's order; empty if only the loss does.
        what: "tensors", "loss", "names" or "steps".
    """

    workers: int
    against: int
    step: int | None
    tensors: tuple[str, ...]
    what: str

    def in_words(self) -> str:
        """Return one sentence."""
        both = f"with {self.workers} worker{'s' * (self.workers != 1)} and with {self.against}"
        if self.what == "steps":
            return f"The runs {both} made different numbers of steps."
        if self.what == "names":
            return f"At step {self.step} the runs {both} hold different tensors: {', '.join(self.tensors[:5])}."
        if self.what == "loss":
            return f"The loss of step {self.step} differs between the runs {both}; the weights after it do not."
        more = len(self.tensors) - 1
        rest = f" and {more} other{'s' * (more > 1)}" if more else ""
        return f"Step {self.step} is the first to differ between the runs {both}: tensor {self.tensors[0]!r}{rest}."


def first_difference(traces: Mapping[int, Trace]) -> Difference | None:
    """Return the earliest difference between any trace and the first one, None if all are equal.

    Args:
        traces: by number of workers.
    """
    against, *others = traces
    found = [d for d in (_between(against, traces[against], count, traces[count]) for count in others) if d is not None]
    return min(found, key=lambda d: d.step if d.step is not None else float("inf"), default=None)


def _between(against: int, expected: Trace, count: int, trace: Trace) -> Difference | None:
    def at(step: int | None, tensors: Sequence[str], what: str) -> Difference:
        return Difference(workers=count, against=against, step=step, tensors=tuple(tensors), what=what)

    for ours, theirs in zip(trace, expected, strict=False):
        mine, reference = ours["tensors"], theirs["tensors"]
        if mine.keys() != reference.keys():
            return at(ours["step"], sorted(mine.keys() ^ reference.keys()), "names")
        differing = [name for name in reference if mine[name] != reference[name]]
        if differing:
            return at(ours["step"], differing, "tensors")
        # As JSON text, so that two NaN are the same.
        if repr(ours["loss"]) != repr(theirs["loss"]):
            return at(ours["step"], (), "loss")
    return at(None, (), "steps") if len(trace) != len(expected) else None
