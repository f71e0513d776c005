"""What `samestep checkpoint` does. torch is imported when it is called."""

from __future__ import annotations

from typing import Any


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


def export_weights(path: str, out: str) -> Any:
    """Write the weights of the newest good checkpoint as a plain safetensors file.

    Returns:
        A `samestep.storage.stock.Exported`.

    Raises:
        CheckpointError: there is no good one, the file exists, or it cannot be written.
    """
    from samestep.storage import stock

    return stock.export_weights(path, out)
