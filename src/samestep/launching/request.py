"""Frames between a command (`samestep ps`, `scale`, `stop`) and a run: small, versioned, and never trusted.

magic "sams" | version | length of the rest, at most 4096 | a JSON object
"""

from __future__ import annotations

import json
import struct
from typing import Any

from samestep.errors import WorkerError

VERSION = 1
MOST_BYTES = 4096
"""Longest body of a frame."""
_HEADER = struct.Struct("!4sHH")
_MAGIC = b"sams"
FRAME_BYTES = _HEADER.size + MOST_BYTES
"""Longest frame."""


def packed(facts: dict[str, Any]) -> bytes:
    """Return the frame of plain facts."""
    body = json.dumps(facts, ensure_ascii=False).encode(errors="replace")
    if len(body) > MOST_BYTES:
        raise ValueError(f"A frame of {len(body)} bytes is too long.")
    return _HEADER.pack(_MAGIC, VERSION, len(body)) + body


def unpacked(data: bytes) -> dict[str, Any] | None:
    """Return the facts of the frame that `data` is, None while it is not whole.

    Raises:
        WorkerError: it is no frame, or not of this version.
    """
    if data[:4] != _MAGIC[: len(data)]:
        raise WorkerError("That is not a frame of samestep.")
    if len(data) < _HEADER.size:
        return None
    _, version, length = _HEADER.unpack_from(data)
    if version != VERSION:
        raise WorkerError(
            f"The run and this command are of different versions of samestep (frames of version {VERSION} and "
            f"{version}). Use the samestep that started the run."
        )
    if length > MOST_BYTES or len(data) > _HEADER.size + length:
        raise WorkerError(f"The frame is longer than it may be, or than it says ({length} bytes).")
    if len(data) < _HEADER.size + length:
        return None
    try:
        facts = json.loads(data[_HEADER.size :])
    except (ValueError, RecursionError) as error:
        raise WorkerError(f"The frame cannot be read: {error}.") from None
    if not isinstance(facts, dict):
        raise WorkerError("The frame holds no object.")
    return facts
