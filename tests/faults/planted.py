"""Plants bugs in our own protocol, one at a time, and sees that a run under strikes is found to be wrong.

    python -m tests.faults.planted                    all of them
    python -m tests.faults.planted --only snapshot

A bug that lives would mean that the campaigns look too little. Each has the runs that show it; without the bug the same
runs are right. Bugs in the writing of checkpoints (renamed before they are on the disk, written in place, ...) are
planted in `test_checkpoint_campaign.py`. Prints one JSON line per bug and one at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import json
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.append(str(Path(__file__).parent))
from points import DEADLINE, Case, Points, zygote_here
from striking import Strike, function_named

Plant = Callable[[contextlib.ExitStack], Any]
_HANG_SECONDS = 5.0
"""After which a run that never ends is ended."""


@dataclass(frozen=True)
class Bug:
    """One planted bug.

    Attributes:
        name: what is wrong.
        plant: puts it into this process, from which the workers are forked, for as long as a stack is open.
        cases: runs that must be found wrong, one of them at least.
        limit_seconds: after which a run counts as hung.
    """

    name: str
    plant: Plant
    cases: tuple[Case, ...]
    limit_seconds: float = DEADLINE


def owner_of(name: str) -> tuple[Any, str]:
    """Return the class or module that holds what "module:Class.function" names, and the name there."""
    module, _, path = name.partition(":")
    *classes, last = path.split(".")
    owner: Any = importlib.import_module(f"samestep.{module}")
    for part in classes:
        owner = getattr(owner, part)
    return owner, last


def edited(name: str, old: str, new: str) -> Plant:
    """Plant by changing text in a function's source. Lines keep their numbers, so points stay where they are."""

    def plant(stack: contextlib.ExitStack) -> None:
        function = function_named(f"samestep.{name}")
        source = textwrap.dedent(inspect.getsource(function))
        assert old in source and old.count("\n") == new.count("\n"), f"{name} has no {old!r}"
        code = function.__code__
        above = "from __future__ import annotations" + "\n" * (code.co_firstlineno - 1)
        space: dict[str, Any] = {}
        exec(compile(above + source.replace(old, new), code.co_filename, "exec"), function.__globals__, space)
        owner, last = owner_of(name)
        stack.enter_context(mock.patch.object(owner, last, space[last]))

    return plant


def wrapped(name: str, make: Callable[[Any], Any]) -> Plant:
    """Plant by putting `make(function as it is)` in a function's place."""

    def plant(stack: contextlib.ExitStack) -> None:
        owner, last = owner_of(name)
        stack.enter_context(mock.patch.object(owner, last, make(inspect.getattr_static(owner, last))))

    return plant


def both(*plants: Plant) -> Plant:
    return lambda stack: [plant(stack) for plant in plants]


def in_contents(change: Callable[[dict, dict, dict], None]) -> Plant:
    """Change what is kept: weights, other tensors, plain values."""

    def make(old: Any) -> Any:
        def contents(self: Any, states: list) -> tuple[dict, dict, dict]:
            weights, state, model = old(self, states)
            change(weights, state, model)
            return weights, state, model

        return contents

    return wrapped("loop.archive:Archive._contents", make)


def zero(part: int, ending: str) -> Plant:
    """Keep zeros in place of the tensors, of weights (0) or state (1), whose names have an ending."""

    def change(*parts: dict) -> None:
        names = [name for name in parts[part] if name.endswith(ending)]
        assert names, ending
        for name in names:
            parts[part][name] = parts[part][name].clone().zero_()

    return in_contents(change)


def weights_from_before_the_update(stack: contextlib.ExitStack) -> None:
    """What is kept are the calls up to this update, and the weights before it."""
    before: dict[str, Any] = {}

    def commit(old: Any) -> Any:
        def noted(self: Any, request: Any, trained: Any, reduced: Any) -> None:
            named = zip(trained.weights.names, trained.weights.parameters, strict=True)
            before.update((name, parameter.detach().clone()) for name, parameter in named)
            old(self, request, trained, reduced)

        return noted

    wrapped("agree.synchronous:LiveSynchronous._commit", commit)(stack)
    in_contents(lambda weights, state, model: weights.update(before))(stack)


def one_call_short(old: Any) -> Any:
    def to_facts(self: Any, first: int = 0) -> dict[str, Any]:
        facts = old(self, first)
        ends = facts["end_of"][:-8]
        log = facts["log"][: int.from_bytes(ends[-8:], "little")]
        return {**facts, "site_of": facts["site_of"][:-4], "end_of": ends, "log": log}

    return to_facts


def one_call_long(old: Any) -> Any:
    def to_facts(self: Any, first: int = 0) -> dict[str, Any]:
        facts = old(self, first)
        start = int.from_bytes(facts["end_of"][-16:-8], "little")
        log = facts["log"] + facts["log"][start:]
        ends = facts["end_of"] + len(log).to_bytes(8, "little")
        return {**facts, "site_of": facts["site_of"] + facts["site_of"][-4:], "end_of": ends, "log": log}

    return to_facts


def table(points: Points) -> list[Bug]:
    """Return the bugs."""

    def at(kind: str, rank: int, function: str, text: str, time: int = 1, birth: int = 0) -> Strike:
        return Strike(kind, rank, birth, points.at(function, text), time)

    def case(*strikes: Strike, writes: bool = False) -> tuple[Case, ...]:
        return (Case(writes, strikes),)

    update = "Stepping.update", "session, model ="
    # State is kept in memory after steps 1, 3, 4, 6; in files after every step. They count from 0.
    dead = case(at("kill", 0, *update, 7))
    from_files = case(at("kill", 1, *update, 2), writes=True)
    copying = "Snapshots.write", "_place(memory, start, places[index]).copy_"
    # Both: one that is left would write it again.
    torn = case(at("kill", 0, *copying, 40), at("kill", 1, "Crew.regroup", "group, calls ="))
    commits = "agree.synchronous:LiveSynchronous._commit"
    replay, snapshot, round_ = "loop.replay:Replay.reach", "core.snapshot:Snapshots.write", "core.arena:Arena._round"
    to_facts, saves = "storage.ledger:Ledger.to_facts", "run.archive.save(folder, done"
    told = "self.ledger.next(kind, where)"
    # Else the fold of what was written tells, and the older one is taken.
    unchecked = edited("core.snapshot:Snapshots._read", "fold(memory, length) != self._words[_FOLD + number]", "False")
    return [
        Bug("a snapshot without Adam's first moment", zero(1, ".exp_avg"), dead),
        Bug("a snapshot without Adam's second moment", zero(1, ".exp_avg_sq"), dead),
        Bug("a snapshot without Adam's step", zero(1, ".step"), dead),
        Bug("a snapshot without a buffer", zero(0, "running_mean"), dead),
        Bug("a checkpoint without a buffer", zero(0, "running_var"), from_files),
        Bug(
            "what is registered besides modules is not restored",
            edited("loop.archive:Archive._set_others", "other.load_state_dict(state)", "pass"),
            dead,
        ),
        Bug(
            "optimizer state is not restored",
            edited("loop.archive:Archive._restore_optimizer", "trained.update.load(full if is_alike else {})", "pass"),
            dead,
        ),
        Bug("a snapshot holds the weights before its last update", weights_from_before_the_update, dead),
        Bug(
            "the ledger in a snapshot is one call short",
            wrapped(to_facts, one_call_short),
            dead,
        ),
        Bug("the ledger in a snapshot is one call long", wrapped(to_facts, one_call_long), dead),
        Bug(
            "one memory, and writing to it is not marked",
            both(
                edited(snapshot, "self._words[number] = 0", "pass"),
                wrapped("core.snapshot:Snapshots._next", lambda old: lambda self, num_bytes: 0),
                unchecked,
            ),
            torn,
        ),
        Bug(
            "the facts of one snapshot with the tensors of the other",
            edited(
                "core.snapshot:Snapshots._read",
                "tensors = [_place(memory, start, place)",
                "memory = mmap.mmap(self._memories[1 - number], 0); tensors = [_place(memory, start, place)",
            ),
            dead,
        ),
        Bug(
            "state is restored before the replay is over",
            edited(replay, "saved is None or self._run.ledger.replaying or", "saved is None or"),
            dead,
        ),
        Bug(
            "state is restored a step late",
            edited(replay, "if saved is None or", "if saved is None or self._run.record.num_steps <= saved.step or"),
            dead,
        ),
        Bug(
            "samples that another worker has read are not counted",
            edited(
                "agree.meeting:Meeting.__init__",
                "sum(v[7][0] for v in values)",
                "sum(v[7][0] for v in values[:1])",
            ),
            dead,
        ),
        Bug(
            "what was read is not in the ledger",
            edited("agree.meeting:Outcome.to_values", "list(self.read)", "[0, 0]"),
            dead,
        ),
        Bug(
            "a replayed once is executed again",
            edited(
                "loop.session:Session.recorded",
                f"return {told}",
                f"return {told} if kind != 'once' else (make(), {told})[1]",
            ),
            dead,
        ),
        Bug(
            "a replayed call gives the result of the one before",
            edited("storage.ledger:Ledger.next", "self._value(number)", "self._value(max(number - 1, 1))"),
            dead,
        ),
        Bug(
            "replayed steps are not seeded",
            both(
                edited("loop.stepping:Stepping._one", "seed_step(self.", "shards is None or seed_step(self."),
                edited("loop.step:Step.__iter__", "seed_step(self._seed, self.number)", "pass"),
            ),
            dead,
        ),
        Bug(
            "the data goes on one batch too far after a replay",
            edited(
                "loop.stepping:Stepping.walk",
                "ahead: deque[Slice] = deque()",
                "session.replay._num_known and next(slices, None); ahead: deque[Slice] = deque()",
            ),
            dead,
        ),
        Bug(
            "the rule on what is not finite is lost in a restart",
            edited(
                "loop.run:Run.replicate",
                "= Tolerance(nonfinite),",
                "= Tolerance('stop' if self._session.replay._num_known else nonfinite),",
            ),
            dead,
        ),
        Bug(
            "steps are told again in a replay",
            wrapped("loop.replay:Replay.silent", lambda old: property(lambda self: False)),
            dead,
        ),
        Bug(
            "a checkpoint is named by the step before",
            edited("loop.keeper:Keeper.write", saves, f"{saves} - 1"),
            from_files,
        ),
        Bug(
            "no barrier at the commit",
            edited(
                commits,
                'met = self.calls.meet("step.update (commit)", request.where, None, frame)',
                "met = self.calls.meet('', '', None, frame) if request.seeds[1] < 1 else [(None, b'')]",
            ),
            case(at("pause", 1, "Fold.chunk", "program = self._programs[index]", 4)),
        ),
        Bug(
            "one message buffer for even and odd exchanges",
            edited(round_, "self.count & 1", "0"),
            case(at("pause", 1, "Arena._round", "replies, most = [], 1", 9)),
        ),
        Bug(
            "arrived is counted before the message is written",
            edited(round_, "length = len(message)", "length = len(message); words[self._mine] = self.count + 1"),
            case(at("pause", 1, "Arena._round", "self._messages[start : start + length] = message", 9)),
        ),
        Bug(
            "an exchange does not wait for the last",
            edited("core.arena:Arena._wait", "words[line] < count]", "words[line] < count - 1]"),
            case(at("pause", 1, "Arena._round", "length = len(message)", 9)),
        ),
        Bug(
            "a worker that is stopped is not looked for",
            wrapped("guarding.fence:Fence.look", lambda old: lambda *arguments: None),
            case(at("stop", 1, *update, 7)),
            limit_seconds=_HANG_SECONDS,
        ),
    ]


def judged(bug: Bug, points: Points) -> tuple[list[str], list[str]]:
    """Return what is wrong with the runs of a bug: while it is planted, and without it."""
    with_bug: list[str] = []
    with contextlib.ExitStack() as stack:
        bug.plant(stack)
        for case in bug.cases:
            with_bug += points.judge(case, bug.limit_seconds)[0]
    return with_bug, [wrong for case in bug.cases for wrong in without_bug(case, points)]


_right: dict[Case, list[str]] = {}


def without_bug(case: Case, points: Points) -> list[str]:
    """Return what is wrong with a run that no bug was planted in; each is played once."""
    if case not in _right:
        wrong, has_struck, _ = points.judge(case)
        _right[case] = wrong if has_struck else [*wrong, "it did not strike"]
    return _right[case]


def campaign(bugs: list[Bug], points: Points) -> int:
    """Plant the bugs; return how many live, or have runs that are wrong by themselves."""
    num_wrong = 0
    for bug in bugs:
        wrong, by_itself = judged(bug, points)
        num_wrong += not wrong or bool(by_itself)
        print(json.dumps({"bug": bug.name, "found": bool(wrong), "by": wrong, "without": by_itself}), flush=True)
    print(json.dumps({"bugs": len(bugs), "wrong": num_wrong}))
    return num_wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="bugs whose names hold this text")
    chosen = parser.parse_args()
    with zygote_here():
        known = Points()
        num_wrong = campaign([bug for bug in table(known) if chosen.only in bug.name], known)
    sys.exit(min(num_wrong, 1))
