"""What `samestep checkpoint` and the writer beside training do. torch is imported when it is called."""

from __future__ import annotations

import os
from typing import Any

from samestep.errors import CheckpointError, StorageError


def stored_checkpoints(path: str, in_full: bool) -> list[Any]:
    """Return what lies in a run's folder, or is one step: `samestep.storage.stock.Item` of each, oldest first.

    Args:
        path: the folder.
        in_full: read every byte, or only the manifests and the files' sizes.

    Raises:
        CheckpointError: there is none.
    """
    from samestep.storage import stock

    return stock.items_in(path, in_full)


def write_lent(snapshots: Any, order: dict[str, Any]) -> dict[str, Any]:
    """Write the snapshot that is lent as a checkpoint, and delete the oldest ones.

    Args:
        snapshots: a `samestep.core.snapshot.Snapshots`.
        order: see `samestep.loop.supervision.Writer`; so for the answer.
    """
    from samestep.storage import checkpoint

    saved = snapshots.lent()
    if saved is None:
        return _damaged(order)
    if order["cwd"] is not None:
        os.chdir(order["cwd"])
    parts = {"weights": saved.weights, "state": saved.state, "facts": saved.facts}
    try:
        path = checkpoint.write(order["folder"], step=saved.step, **parts)
    except CheckpointError as error:
        return {"message": str(error), "reason": getattr(error, "reason", None)}
    if snapshots.lent() is None:
        # It was found out meanwhile, or a bit flipped while it was written.
        checkpoint.set_aside(path)
        return _damaged(order)
    try:
        checkpoint.keep(order["folder"], order["keep"], trusted=path)
    except StorageError as error:
        return {"step": saved.step, "trouble": [str(error), error.reason]}
    return {"step": saved.step, "trouble": None}


def _damaged(order: dict[str, Any]) -> dict[str, Any]:
    reason = "the state that was kept in memory is damaged"
    where = f"step {order['step']} to {order['folder']}"
    return {"message": f"The checkpoint of {where} was given up: {reason}.", "reason": reason}


def export_weights(path: str, out: str) -> Any:
    """Write the weights of the newest good checkpoint as a plain safetensors file.

    Returns:
        A `samestep.storage.stock.Exported`.

    Raises:
        CheckpointError: there is no good one, the file exists, or it cannot be written.
    """
    from samestep.storage import stock

    return stock.export_weights(path, out)
