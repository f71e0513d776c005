"""What a run did, in words that anyone understands, and as facts that a program reads."""

from __future__ import annotations

import json
import math
import os
import tempfile
from typing import Any, TextIO

from samestep.errors import SettingsError
from samestep.units import bytes_in_words, count_in_words, seconds_in_words

PHASES = {
    "compute": ("compute", "green"),
    "data": ("data", "yellow"),
    "wait": ("wait", "red"),
    "update": ("reduce+update", "blue"),
    "other": ("other", "white"),
}
"""Phase -> what a person calls it, and its colour."""

_BAR_WIDTH = 48
_TOO_SHORT = 3.0
"""Seconds. A shorter run says nothing about where time goes."""


def advice(facts: dict[str, Any]) -> str:
    """Return one sentence on what would make the run faster, or that nothing stands out; empty for a very short run.

    Args:
        facts: of the run; `seconds` by phase decides.
    """
    shares = shares_of(facts)
    workers = facts.get("workers") or 1
    if not shares or facts.get("seconds_total", _TOO_SHORT) < _TOO_SHORT:
        return ""
    if shares.get("data", 0.0) > 0.20 and not facts.get("clients"):
        return (
            f"Loading data took {shares['data']:.0%} of the time. Read ahead in background processes: "
            "run.steps(..., loaders=2)."
        )
    if workers > 1 and shares.get("wait", 0.0) > 0.25:
        return f"Workers waited for each other {shares['wait']:.0%} of the time. {_why_waiting(facts, workers)}"
    if shares.get("update", 0.0) > 0.40:
        return (
            f"Reducing and updating took {shares['update']:.0%} of the time: much model for little data per step. A "
            "larger batch_size would use the machine better (a new recipe: results change)."
        )
    if shares.get("other", 0.0) > 0.40:
        return (
            f"{shares['other']:.0%} of the time went to the script's own code outside of steps: evaluation, set-up, or "
            "work between steps."
        )
    return "Nothing stands out: the time went where it should."


def shares_of(facts: dict[str, Any]) -> dict[str, float]:
    """Return the share of the time of each phase, 0..1; empty if it is not known."""
    seconds = {name: value for name, value in (facts.get("seconds") or {}).items() if value and value > 0}
    total = math.fsum(seconds.values())
    return {name: value / total for name, value in seconds.items()} if total > 0 else {}


def rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the lines of the summary: a name, and words. What is not known is left out."""
    return [(name, text) for name, text in _all_rows(facts) if text]


def show(facts: dict[str, Any], stream: TextIO) -> None:
    """Print the summary as a panel."""
    from rich.console import Console
    from rich.panel import Panel

    # A file or a log has no width of its own; the panel must not be cut at 80 columns there.
    console = Console(file=stream, width=None if stream.isatty() else 100, highlight=False)
    console.print(Panel(render(facts), title="samestep", title_align="left", expand=False))


def render(facts: dict[str, Any]) -> Any:
    """Return the summary as something that rich can print."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    shares = shares_of(facts)
    for name, text in rows(facts):
        table.add_row(name, Text(text, style=_style_of(name, facts)))
        if name == "time" and shares:
            table.add_row("", _bar(shares))
            table.add_row("", _legend(shares))
    parts: list[Any] = [table]
    if tip := advice(facts):
        parts += [Text(), Text(tip, style="italic")]
    return Group(*parts)


def store(facts: dict[str, Any], path: str) -> None:
    """Write the facts as JSON; the file appears whole or not at all.

    Raises:
        SettingsError: it cannot be written.
    """
    target = os.path.abspath(path)
    text = json.dumps({name: _storable(value) for name, value in facts.items()}, indent=2, sort_keys=True)
    try:
        descriptor, temporary = tempfile.mkstemp(dir=os.path.dirname(target), prefix=".summary-")
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(text + "\n")
            os.chmod(temporary, 0o644)
            os.replace(temporary, target)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise SettingsError(f"The summary cannot be written to {path}: {error.strerror}. Name another file.") from None


def _all_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    steps, speed = facts.get("steps"), facts.get("samples_per_second")
    seconds, memory, state = facts.get("seconds_total"), facts.get("peak_memory_bytes"), facts.get("state_bytes")
    work = []
    if steps is not None:
        work.append(f"{count_in_words(steps)} steps")
    if facts.get("samples") is not None:
        work.append(f"{count_in_words(facts['samples'])} samples")
    time = seconds_in_words(seconds) if seconds is not None else ""
    used = f"{bytes_in_words(memory)} at most, over all workers" if memory else ""
    if state:
        used += f"{'; ' if used else ''}{bytes_in_words(state)} of it for training state" if used else ""
    if used and facts.get("snapshot_bytes"):
        used += f", {bytes_in_words(facts['snapshot_bytes'])} to survive deaths"
    return [
        ("result", _result_in_words(facts.get("result"))),
        ("last logged", _result_in_words(facts.get("logged") or None)),
        ("time", f"{time} for {', '.join(work)}" if time and work else time),
        ("speed", f"{count_in_words(round(speed))} samples/s" if speed else ""),
        ("memory", used),
        ("fleet", _fleet_in_words(facts)),
        ("agreement", _agreement_in_words(facts)),
        ("site", _site_in_words(facts)),
        *(("balance", move["words"]) for move in facts.get("moves") or ()),
        ("samples", _samples_in_words(facts)),
        ("privacy", facts.get("privacy") or ""),
        ("weights", _digest_in_words(facts)),
        ("staleness", _staleness_in_words(facts)),
        ("memory checks", _checks_in_words(facts)),
        ("audits", _audits_in_words(facts)),
        ("checkpoints", _saves_in_words(facts)),
        *(("note", str(note)) for note in facts.get("notes") or ()),
    ]


def _result_in_words(result: Any) -> str:
    if result is None:
        return ""
    if isinstance(result, bool):
        return str(result)
    if isinstance(result, float):
        return f"{result:.6g}"
    if isinstance(result, dict):
        return ", ".join(f"{name} {_number_in_words(str(name), value)}" for name, value in result.items())
    text = str(result)
    return text if len(text) <= 200 else text[:200] + " ..."


def _number_in_words(name: str, value: Any) -> str:
    is_share = isinstance(value, float) and 0.0 <= value <= 1.0
    if is_share and any(word in name.lower() for word in ("accuracy", "precision", "recall")):
        return f"{value:.1%}"
    return _result_in_words(value)


def _fleet_in_words(facts: dict[str, Any]) -> str:
    parts = []
    for name, one in (("workers", "worker"), ("replicas", "replica")):
        if facts.get(name) is not None:
            parts.append(f"{facts[name]} {one if facts[name] == 1 else name}")
    if facts.get("threads") is not None:
        parts.append(f"{facts['threads']} thread{'s' * (facts['threads'] != 1)} each")
    if facts.get("seed") is not None:
        parts.append(f"seed {facts['seed']}")
    for name, prefix in (("device", ""), ("torch", "torch ")):
        if facts.get(name):
            parts.append(f"{prefix}{facts[name]}")
    return ", ".join(parts)


def _samples_in_words(facts: dict[str, Any]) -> str:
    sentence, holds = facts.get("samples_sentence") or "", facts.get("samples_exactly_once")
    if holds is False:
        return f"NOT each sample exactly once. {sentence}".rstrip()
    return sentence or ("each sample exactly once" if holds else "")


def _agreement_in_words(facts: dict[str, Any]) -> str:
    """Return words unless replicas agreed at every step, on gradients as they are."""
    parts = [facts["agreement"]] if facts.get("agreement") else []
    if facts.get("rounds") is not None:
        parts.append(f"{count_in_words(facts['rounds'])} rounds")
    if facts.get("bytes_per_replica"):
        parts.append(f"{bytes_in_words(facts['bytes_per_replica'])} encoded per replica")
    return "; ".join(parts)


def _digest_in_words(facts: dict[str, Any]) -> str:
    digest = facts.get("weights_digest")
    if digest and any(map(int, facts.get("staleness") or ())) and not facts.get("fixed_schedule"):
        return f"{digest} (the same for any number of workers that replay this schedule)"
    if digest and facts.get("site"):
        return f"{digest} (the same for any number of workers of each site, where the same sites make the same rounds)"
    return f"{digest} (the same for any number of workers)" if digest and _keeps_promise(facts) else digest or ""


def _site_in_words(facts: dict[str, Any]) -> str:
    """Return what became of what this site gave to the others."""
    site = facts.get("site")
    if not site:
        return ""
    parts = [f"{count_in_words(site['counted'])} contributions, {bytes_in_words(site['num_bytes'])}"]
    for name, words in (
        ("late", "late"),
        ("refused", "too old to count"),
        ("missed", "times the meeting place was not reached"),
    ):
        if site[name]:
            parts.append(f"{count_in_words(site[name])} {words}")
    return f"{'; '.join(parts)}; the newest weights are those of round {count_in_words(site['round'])}"


def _staleness_in_words(facts: dict[str, Any]) -> str:
    counts = facts.get("staleness")
    if not counts:
        return ""
    total = sum(counts.values())
    shares = ", ".join(f"{lag}: {count / total:.0%}" for lag, count in counts.items())
    taken = bytes_in_words(facts["stale_bytes"]) + (" per worker" if facts.get("stale_per_worker") else "")
    return f"updates that a shard's weights lacked: {shares} of the shards; {taken} for updates under way"


def _checks_in_words(facts: dict[str, Any]) -> str:
    updates, verified = facts.get("updates"), facts.get("updates_verified")
    if not updates or not verified:
        return ""
    return f"no bit flipped before {count_in_words(verified)} of {count_in_words(updates)} updates"


def _audits_in_words(facts: dict[str, Any]) -> str:
    count = facts.get("audited")
    if not count:
        return ""
    who = "by two workers" if (facts.get("workers") or 1) > 1 else "twice"
    shards, were = ("shards", "were") if count > 1 else ("shard", "was")
    return f"{count_in_words(count)} {shards} {were} computed {who}, with the same bits"


def _saves_in_words(facts: dict[str, Any]) -> str:
    """Return words only where a save failed or was skipped."""
    failed, saves, reason = facts.get("saves_failed"), facts.get("saves"), facts.get("saving_fails")
    if failed and reason:
        return f"{failed} of {saves} saves FAILED, the last one too: {reason}. The end of this run is in no checkpoint."
    skipped = facts.get("saves_skipped")
    words = [f"{failed} of {saves} saves failed; the last one worked"] if failed else []
    if skipped:
        words.append(f"{skipped} {'was' if skipped == 1 else 'were'} due while the one before was still being written")
    return "; ".join(words)


def _keeps_promise(facts: dict[str, Any]) -> bool:
    return bool(facts.get("replicas_fixed", True))


def _style_of(name: str, facts: dict[str, Any]) -> str:
    if name == "samples":
        return "red" if facts.get("samples_exactly_once") is False else "green"
    if name == "checkpoints":
        return "red" if facts.get("saving_fails") else "yellow"
    return {"result": "bold", "weights": "cyan"}.get(name, "")


def _bar(shares: dict[str, float]) -> Any:
    from rich.text import Text

    bar, end = Text(), 0.0
    for phase, (_, colour) in PHASES.items():
        begin, end = end, end + shares.get(phase, 0.0)
        bar.append("█" * (round(end * _BAR_WIDTH) - round(begin * _BAR_WIDTH)), style=colour)
    return bar


def _legend(shares: dict[str, float]) -> Any:
    from rich.text import Text

    known = [(shares[phase], words, colour) for phase, (words, colour) in PHASES.items() if phase in shares]
    legend = Text()
    for share, words, colour in sorted(known, reverse=True):
        if legend:
            legend.append(", ")
        legend.append(f"{words} {share:.0%}", style=colour)
    return legend


def _why_waiting(facts: dict[str, Any], workers: int) -> str:
    replicas = facts.get("replicas") or workers
    if replicas % workers:
        most, fewest = -(-replicas // workers), replicas // workers
        return (
            f"{replicas} replicas do not divide evenly by {workers} workers, so some play {most} and some {fewest}: "
            "use a number of workers that divides them."
        )
    cores = os.cpu_count() or workers
    if workers * (facts.get("threads") or 1) > cores:
        return f"There are only {cores} cores for them: use fewer workers."
    return "Something else used the cores, steps are very short, or shards differ much in work."


def _storable(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {str(name): _storable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_storable(item) for item in value]
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "size", None) == 1:
        return item()
    return str(value)
