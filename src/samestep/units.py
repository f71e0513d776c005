"""Sizes, times and counts to words."""

from __future__ import annotations

import math

_BINARY = ("KiB", "MiB", "GiB", "TiB", "PiB")
_MINUTE, _HOUR, _DAY = 60, 3600, 86400


def bytes_in_words(num_bytes: float) -> str:
    """Return a size in bytes as words: "512 B", "25.0 MiB"."""
    if abs(num_bytes) < 1023.5:
        return f"{num_bytes:.0f} B"
    size = float(num_bytes)
    for unit in _BINARY:
        size /= 1024
        if abs(size) < 1023.95 or unit == _BINARY[-1]:
            break
    return f"{size:,.1f} {unit}"


def seconds_in_words(seconds: float) -> str:
    """Return a duration in seconds as words: "3.2 ms", "12.0 s", "1 min 12 s", "2 h 5 min", "3 d 4 h"."""
    if not math.isfinite(seconds):
        return f"{seconds} s"
    if seconds < 0:
        return f"-{seconds_in_words(-seconds)}"
    if seconds == 0:
        return "0 s"
    if seconds < 0.99995e-3:
        return f"{seconds * 1e6:.1f} us"
    if seconds < 0.99995:
        return f"{seconds * 1e3:.1f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    if seconds < _HOUR - 0.5:
        minutes, rest = divmod(round(seconds), _MINUTE)
        return f"{minutes} min {rest} s"
    if seconds < _DAY - _MINUTE / 2:
        hours, rest = divmod(round(seconds / _MINUTE), _HOUR // _MINUTE)
        return f"{hours} h {rest} min"
    days, rest = divmod(round(seconds / _HOUR), _DAY // _HOUR)
    return f"{days:,} d {rest} h"


def count_in_words(count: int) -> str:
    """Return a count with its thousands apart: "1,437"."""
    return f"{count:,}"
