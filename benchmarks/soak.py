"""Trains the digits for minutes under a random fault every few seconds: what is left of the speed, and of the bits.

python benchmarks/soak.py
python benchmarks/soak.py --minutes 20 --store docs/measured/soak.md --json soak.json

The same training is made again and again: once undisturbed, under faults until the minutes are over, once undisturbed.
A fault is a SIGKILL, SIGSTOP, SIGSEGV or exit of a random worker. Goodput: steps per second under faults, divided by
the undisturbed ones of before and after.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from report import Table, machine, show, store

from samestep.launching import environment, zygote
from samestep.launching.output import Plumbing
from samestep.launching.script import Script
from samestep.launching.supervisor import supervise

SCRIPT = Path(__file__).parents[1] / "examples" / "digits.py"
SAME = ("weights_digest", "optimizer_digest", "samples_digest", "samples_exactly_once", "steps", "result")
FAULTS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "crash": signal.SIGSEGV, "exit": signal.SIGUSR2}
"""What can happen, and the signal that makes it; workers answer to the last by `os._exit`."""
AIM = 0.85


@dataclass(frozen=True)
class Fault:
    """What was done."""

    kind: str


@dataclass
class Strike:
    """One fault.

    Attributes:
        fault: what was done.
        ranks: to which worker.
        at: seconds of the monotonic clock.
        num_calls: calls that the run had recorded.
        noticed_after: seconds until the supervisor knew.
        recovered_after: seconds until a new call was recorded; None if the run ended before.
    """

    fault: Fault
    ranks: tuple[int, ...]
    at: float
    num_calls: int
    noticed_after: float | None = None
    recovered_after: float | None = None


@dataclass
class Weather:
    """Strikes a random worker every so many seconds, over all runs; what a supervisor takes as its injector.

    Attributes:
        every: seconds between faults.
        draw: chooses kinds and workers.
        due: when the next one comes, in seconds of the monotonic clock.
        strikes: those of the run under way.
    """

    every: float
    draw: random.Random
    due: float
    snapshots: Any = None
    strikes: list[Strike] = field(default_factory=list)
    faults: Sequence[Fault] = ()

    def poll(self, now: float, victims: Sequence[Any]) -> None:
        """Strike if it is time to, and take note of a recovery."""
        count = self.snapshots.num_calls
        last = self.strikes[-1] if self.strikes else None
        is_down = last is not None and last.recovered_after is None and last.noticed_after is not None
        if last is not None and is_down and count > last.num_calls:
            last.recovered_after = now - last.at
        alive = [victim for victim in victims if victim.is_alive]
        # Before the first step there is nothing to lose.
        if now >= self.due and alive and count:
            self.due += self.every
            kind, victim = self.draw.choice(list(FAULTS)), self.draw.choice(alive)
            self.strikes.append(Strike(Fault(kind), (victim.rank,), now, count))
            victim.send_signal(FAULTS[kind])

    def hear(self, text: str, now: float) -> None:
        """Take note of what the run tells its user."""

    def ended(self, now: float) -> None:
        """Take note that the supervisor has seen a worker end."""
        if self.strikes and self.strikes[-1].noticed_after is None:
            self.strikes[-1].noticed_after = now - self.strikes[-1].at


def opened(path: Path, *arguments: str) -> Script:
    """Make this process one that trains a script again and again."""
    program = Script(path=str(path), argv=(str(path), *arguments))
    program.check()
    environment.prepare()
    zygote.warm()
    from samestep.settings.entry import _WARM, _keep

    zygote.warm(_WARM)
    _keep(program)
    return program


class Listener:
    """Takes the facts of a run, and lets the weather hear its notes."""

    def __init__(self, weather: Weather | None) -> None:
        self._weather = weather
        self.facts: dict[str, Any] | None = None

    def frame(self, frame: Any) -> bool:
        if frame.kind == "finished":
            self.facts = frame.info["facts"]
        if frame.kind == "note" and self._weather is not None:
            self._weather.hear(frame.info["text"], time.monotonic())
        return False

    def output(self, stream: int, data: bytes) -> None:
        pass


@dataclass
class Round:
    """One training.

    Attributes:
        seconds: from the first fork to the last exit.
        facts: what it told at its end.
        strikes: what struck it.
        wrong: what must not be.
    """

    seconds: float
    facts: dict[str, Any]
    strikes: list[Strike]
    wrong: list[str]


def body(program: Script, context: Any) -> None:
    """Be a worker that can be told to exit."""
    from samestep.settings.entry import _play_script

    signal.signal(FAULTS["exit"], lambda number, frame: os._exit(7))
    _play_script(program, context)


def play(program: Script, num_workers: int, weather: Weather | None = None) -> Round:
    """Make the training once."""
    from samestep.settings.entry import _fleet
    from samestep.settings.options import Options

    options, listener, begin = Options(workers=num_workers), Listener(weather), time.monotonic()
    descriptors = len(os.listdir("/proc/self/fd"))
    fleet = _fleet(functools.partial(body, program), options, Plumbing(hidden=True))
    assert fleet.snapshots is not None
    if weather is not None:
        weather.snapshots, weather.strikes = fleet.snapshots, []
        fleet = replace(fleet, injector=weather)
    try:
        outcome = supervise(fleet, num_workers, listener)
    finally:
        fleet.snapshots.close()
    seconds, wrong = time.monotonic() - begin, []
    if outcome.code or listener.facts is None:
        wrong.append(f"it ended with exit code {outcome.code}: {outcome.message}")
    if len(os.listdir("/proc/self/fd")) > descriptors:
        wrong.append("descriptors are left")
    try:
        os.waitpid(-1, os.WNOHANG)
        wrong.append("a process is left")
    except ChildProcessError:
        pass
    return Round(seconds, listener.facts or {}, weather.strikes if weather is not None else [], wrong)


def soak(program: Script, num_workers: int, minutes: float, every: float, seed: int) -> tuple[list[Round], list[Round]]:
    """Return the undisturbed trainings (one before, one after) and those under faults."""
    before = play(program, num_workers)
    assert not before.wrong, before.wrong
    begin, disturbed = time.monotonic(), []
    weather = Weather(every, random.Random(seed), begin + every)
    while time.monotonic() < begin + 60 * minutes:
        made = play(program, num_workers, weather)
        made.wrong += [
            f"{key} is {made.facts[key]}, not {before.facts[key]}"
            for key in SAME
            if made.facts and made.facts[key] != before.facts[key]
        ]
        disturbed.append(made)
        print(f"{made.seconds:.1f} s, {len(made.strikes)} faults: {'; '.join(made.wrong) or 'same bits'}", flush=True)
    return [before, play(program, num_workers)], disturbed


def speed(rounds: Sequence[Round]) -> float:
    """Return committed steps per second."""
    return sum(r.facts.get("steps", 0) for r in rounds if not r.wrong) / sum(r.seconds for r in rounds)


def tables(calm: Sequence[Round], disturbed: Sequence[Round]) -> list[Table]:
    """Return what there is to show."""
    goodput = speed(disturbed) / speed(calm)
    strikes = [strike for r in disturbed for strike in r.strikes]
    num_wrong = sum(bool(r.wrong) for r in disturbed)
    whole = Table("Under faults", ["trainings", "steps", "faults", "seconds", "wrong", "goodput", "aim: at least"])
    verdict = f"{AIM:.0%}, {'reached' if goodput >= AIM else 'missed'}"
    steps = sum(r.facts.get("steps", 0) for r in disturbed)
    seconds = sum(r.seconds for r in disturbed)
    whole.rows.append(
        [
            str(len(disturbed)),
            str(steps),
            str(len(strikes)),
            f"{seconds:.0f}",
            str(num_wrong),
            f"{goodput:.1%}",
            verdict,
        ]
    )
    whole.notes.append(
        "Steps per second under faults, divided by the undisturbed ones: "
        f"{speed(disturbed):.1f} / {speed(calm):.1f} ({speed(calm[:1]):.1f} before, {speed(calm[1:]):.1f} after)."
    )
    whole.notes.append("Wrong: a training whose weights, optimizer state, samples, steps or result are others.")
    kinds = Table("Back after", ["fault", "times", "noticed, median", "next call, median", "longest"])
    for kind in FAULTS:
        struck = [strike for strike in strikes if strike.fault.kind == kind]
        back = [strike.recovered_after for strike in struck if strike.recovered_after is not None]
        noticed = [strike.noticed_after for strike in struck if strike.noticed_after is not None]
        if back and noticed:
            longest = f"{max(back):.2f} s"
            middles = [f"{statistics.median(values):.2f} s" for values in (noticed, back)]
            kinds.rows.append([kind, str(len(struck)), *middles, longest])
    return [whole, kinds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--every", type=float, default=15.0, help="seconds between faults")
    parser.add_argument("--epochs", type=int, default=150, help="of each training")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--store", metavar="FILE.md")
    parser.add_argument("--json", metavar="FILE.json")
    args = parser.parse_args()
    where = machine()
    program = opened(SCRIPT, "--epochs", str(args.epochs))
    calm, disturbed = soak(program, args.workers, args.minutes, args.every, args.seed)
    shown = tables(calm, disturbed)
    show(shown, where)
    if args.json:
        facts = {"machine": where, "calm": [asdict(r) for r in calm], "disturbed": [asdict(r) for r in disturbed]}
        Path(args.json).write_text(json.dumps(facts, indent=1))
    if args.store:
        store(shown, where, Path(args.store))
    sys.exit(min(sum(bool(r.wrong) for r in [*disturbed, *calm]), 1))


if __name__ == "__main__":
    main()
