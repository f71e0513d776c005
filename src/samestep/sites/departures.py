"""Which sites have come to their end, on disk: they leave between rounds, and the place may be started again then."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from samestep.sites.table import Table
from samestep.storage import wire
from samestep.storage.checkpoint_file import new_file, sync_folder

_NAME = "ended.frame"


@contextlib.contextmanager
def kept(folder: str | None, training: str, table: Table, tell: Callable[[str], None]) -> Iterator[None]:
    """Write who has ended, if that changes in the `with` block; it is durable then.

    Args:
        folder: of the place, if it has one.
        training: that they took part in.
        table: knows who has ended.
        tell: is given a line of text if it cannot be written.
    """
    before = set(table.ended)
    yield
    if folder is None or table.ended == before:
        return
    target, fresh = Path(folder, _NAME), Path(folder, f".{_NAME}.tmp")
    try:
        fresh.unlink(missing_ok=True)
        with new_file(fresh) as write:
            write(wire.pack({"training": training, "ended": sorted(table.ended)}))
        os.replace(fresh, target)
        sync_folder(target.parent)
    except OSError as error:
        tell(f"WHO HAS COME TO ITS END IS NOT ON DISK: {error}")


def load(folder: str | None, training: str, table: Table) -> None:
    """Let a table know who has ended, if that was written for this training."""
    if folder is None:
        return
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = wire.unpack(Path(folder, _NAME).read_bytes())
        if found["training"] == training:
            table.ended = set(found["ended"])
