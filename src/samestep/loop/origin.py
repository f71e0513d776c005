"""Where a run comes from: code and environment, as plain facts that `settings` finds and a checkpoint keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher

ENTRY_BYTES = 8
"""Of one line of code in `Origin.code`: 4 bytes of digest, 4 of the line's number, little endian."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a run comes from.

    Attributes:
        script: the file (or, where there is none, the function) that holds `main`; "" where it is not known.
        code: the script, and files in its folder that it imported -> their lines of code, `ENTRY_BYTES` for each.
        environment: names of libraries and of environment variables that change bits -> versions and values.
    """

    script: str = ""
    code: Mapping[str, bytes] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


def digests_of(lines: bytes) -> list[bytes]:
    """Return the digests in `lines`, without the numbers: these move when a comment is added."""
    return [lines[i : i + 4] for i in range(0, len(lines), ENTRY_BYTES)]


def changed_lines(there: bytes, here: bytes) -> tuple[str, str]:
    """Return, for each of two texts, in words which of its lines are not in the other."""
    first, second = digests_of(there), digests_of(here)
    if len(first) == len(second) == 1:
        return first[0].hex(), second[0].hex()
    blocks = [b for b in SequenceMatcher(None, first, second, autojunk=False).get_opcodes() if b[0] != "equal"]
    gone = [_number(there, i) for _, start, stop, _, _ in blocks for i in range(start, stop)]
    new = [_number(here, i) for _, _, _, start, stop in blocks for i in range(start, stop)]
    return _in_words(gone, len(first), "there"), _in_words(new, len(second), "here")


def _number(lines: bytes, index: int) -> int:
    return int.from_bytes(lines[index * ENTRY_BYTES + 4 : (index + 1) * ENTRY_BYTES], "little")


def _in_words(changed: Sequence[int], num_lines: int, where: str) -> str:
    count = f"{num_lines} line{'s' * (num_lines != 1)} of code"
    if not changed:
        return count
    shown = ", ".join(map(str, changed[:5])) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
    return f"{count}, only {where} line{'s' * (len(changed) > 1)} {shown}"
