"""The checkpoints that lie in a folder: what they are at a glance, whether they are good, their weights as one file."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import NamedTuple

from samestep.errors import CheckpointError
from samestep.storage.checkpoint import (
    MANIFEST,
    WEIGHTS,
    Location,
    Manifest,
    Skipped,
    is_step,
    read_manifest,
    steps_in,
    verify,
)
from samestep.storage.checkpoint_file import new_file, storage_error, sync_folder
from samestep.storage.digest import joined_digest
from samestep.storage.tensor_file import is_plain, read_tensors

_PIECE_BYTES = 4 << 20


class Item(NamedTuple):
    """One checkpoint at a glance.

    Attributes:
        path: its folder.
        problem: what is wrong with it (a sentence that names the file), or "".
        num_tensors: of weights and state; 0 where the manifest cannot be read, as are the next two.
        num_bytes: of its files, the manifest apart.
        weights_digest: as in the summary of a run that ended there, where the model has no tensor outside state_dict.
        written: seconds since 1970, by the manifest's file.
    """

    path: Path
    problem: str
    num_tensors: int = 0
    num_bytes: int = 0
    weights_digest: str = ""
    written: float | None = None


class Exported(NamedTuple):
    """What `export_weights` wrote.

    Attributes:
        source: the step taken.
        skipped: newer ones that are damaged.
        num_tensors: in the file.
        num_bytes: of the file.
        as_bytes: names of tensors whose dtype not every reader knows: uint8 there, with one more dimension.
    """

    source: Path
    skipped: list[Skipped]
    num_tensors: int
    num_bytes: int
    as_bytes: list[str]


def items_in(path: Location, in_full: bool) -> list[Item]:
    """Return the checkpoints of a run's folder, oldest first, or the one step that `path` is.

    Args:
        path: the folder.
        in_full: read every byte, or only the manifests and the files' sizes.

    Raises:
        CheckpointError: there is none.
    """
    return [_item(step, in_full) for step in _steps(Path(path))]


def export_weights(path: Location, out: Location) -> Exported:
    """Write the weights of the newest good step of a run's folder, or of one step, as one plain safetensors file.

    The file appears whole, verified and on the disk, or not at all.

    Args:
        path: a run's folder, or one of its steps.
        out: the file; never written over.

    Raises:
        CheckpointError: there is no good checkpoint, the file exists, or it cannot be written.
    """
    out = Path(out)
    if os.path.lexists(out):
        raise CheckpointError(f"{out} exists, and is not written over. Name another file, or delete it.")
    skipped: list[Skipped] = []
    steps = _steps(Path(path))
    for step in reversed(steps):
        try:
            verify(step)
            manifest = read_manifest(step)
        except CheckpointError as error:
            skipped.append(Skipped(step, str(error)))
            continue
        _copy_weights(step, manifest, out)
        as_bytes = [name for name, entry in manifest.weights.items() if not is_plain(entry.dtype)]
        return Exported(step, skipped, len(manifest.weights), manifest.files[WEIGHTS][0], as_bytes)
    reasons = "\n".join(f"  {reason}" for _, reason in skipped)
    raise CheckpointError(f"No checkpoint in {path} is good, so nothing was exported:\n{reasons}")


def _steps(path: Path) -> list[Path]:
    steps = [path] if is_step(path) else steps_in(path)
    if not steps:
        raise CheckpointError(
            f"There is no checkpoint in {path}. Give the folder of a run (it holds step-... folders), or one of its "
            f"step-... folders."
        )
    return steps


def _item(path: Path, in_full: bool) -> Item:
    try:
        manifest = read_manifest(path)
        written = os.stat(path / MANIFEST).st_mtime
    except (CheckpointError, OSError) as error:
        return Item(path, str(error))
    problem = ""
    try:
        if in_full:
            verify(path)
        else:
            _check_sizes(path, manifest)
    except CheckpointError as error:
        problem = str(error)
    num_tensors = len(manifest.weights) + len(manifest.state)
    num_bytes = sum(size for size, _ in manifest.files.values())
    digest = joined_digest((name, entry.digest) for name, entry in manifest.weights.items())
    return Item(path, problem, num_tensors, num_bytes, digest, written)


def _check_sizes(path: Path, manifest: Manifest) -> None:
    for name, (size, _) in manifest.files.items():
        try:
            found = os.stat(path / name).st_size
        except OSError as error:
            raise CheckpointError(f"The checkpoint file {path / name} is damaged: {error.strerror}.") from error
        if found != size:
            raise CheckpointError(f"The checkpoint file {path / name} is damaged: it has {found} bytes, not {size}.")


def _copy_weights(step: Path, manifest: Manifest, out: Path) -> None:
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(8)}.tmp")
    try:
        try:
            with open(step / WEIGHTS, "rb") as source, new_file(temporary) as write:
                while piece := source.read(_PIECE_BYTES):
                    write(piece)
            # The disk may have given other bytes than a moment ago.
            read_tensors(temporary, manifest.weights, manifest.files[WEIGHTS], keep_values=False)
            os.rename(temporary, out)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(out.parent)
    except OSError as error:
        raise storage_error(f"The weights could not be written to {out}", error) from error
