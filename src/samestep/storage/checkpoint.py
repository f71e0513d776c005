"""Checkpoints: folders of plain files, published whole by one rename, verified to the last byte when read.

    runs/x/step-00000120/
        weights.safetensors     the model's state_dict, loadable by plain torch
        state.safetensors       every other tensor
        facts.frame             every plain value, as a frame of `storage.wire`
        manifest.json           format, step, sizes, dtypes, shapes, and a digest of every tensor, file and of itself

Order of writing [Note: publish]: the files, the manifest last, each fsynced; the folder that holds them, fsynced; one
rename to the final name; the parent folder, fsynced. Whatever instant the writer or the machine dies at, a name
`step-...` is either absent or whole.

Unfinished folders have hidden names. A writer holds a shared lock on the run's folder; who can get it exclusively
knows that no writer lives, and removes what dead ones left [Note: lock].
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch

from samestep.errors import CheckpointError, StorageError
from samestep.storage import wire
from samestep.storage.checkpoint_file import (
    MAX_JSON_BYTES,
    bytes_digest,
    damaged,
    natural,
    new_file,
    opened,
    storage_error,
    sync_folder,
)
from samestep.storage.digest import joined_digest, tensor_digest
from samestep.storage.tensor_file import Entry, Tensors, read_tensors, write_tensors

WEIGHTS = "weights.safetensors"
STATE = "state.safetensors"
FACTS = "facts.frame"
MANIFEST = "manifest.json"
_FILES = (WEIGHTS, STATE, FACTS)

_FORMAT = "samestep checkpoint"
_VERSION = 2
_LOCK = ".lock"
_STEP_NAME = re.compile(r"step-(\d{8,18})")
_TEMPORARY_NAME = re.compile(r"\.step-\d{8,18}\.\d+-[0-9a-f]{16}\.tmp")
_TRIAL_BYTES = 4096
_SEAL = ',\n "digest": "{}"\n}}\n'

Location: TypeAlias = str | os.PathLike[str]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a checkpoint holds, read and verified. Its tensors own their memory, on the CPU.

    Attributes:
        path: the folder it was read from.
        step: committed steps.
        weights: the model's state_dict, in its order; tied names hold equal, separate tensors.
        state: the other tensors, in order; names that shared one tensor share it again.
        facts: plain values.
        weights_digest: what `tensors_digest(weights.items())` returns.
    """

    path: Path
    step: int
    weights: dict[str, torch.Tensor]
    state: dict[str, torch.Tensor]
    facts: dict[str, Any]
    weights_digest: str


class Skipped(NamedTuple):
    """A checkpoint that could not be read, and why (a sentence that names the file)."""

    path: Path
    reason: str


def write(folder: Location, *, step: int, weights: Tensors, state: Tensors, facts: dict[str, Any]) -> Path:
    """Write a checkpoint to `folder/step-...` and return that path. It is durable once this returns.

    An existing one is never written over: if it is good and holds the same tensors, its path is returned.

    Args:
        folder: the run's folder; made if missing.
        step: committed steps so far, at least 0.
        weights: the model's state_dict.
        state: any other tensors, by name.
        facts: plain values that `wire.pack` takes.

    Raises:
        StorageError: the disk is full, failing or locked, or a damaged checkpoint of this step is in the way.
        CheckpointError: it holds what cannot be written, or the step exists and holds something else.
    """
    folder = Path(folder)
    target = path_of(folder, step)
    assert step == _number_of(target.name) >= 0, f"a checkpoint of step {step}"
    _check("weights", weights)
    _check("state", state)
    try:
        if os.path.lexists(target):
            return _existing(target, weights, state)
        _make_folder(folder)
        with _writing(folder):
            temporary = folder / _temporary_name(target.name)
            try:
                temporary.mkdir()
                _fill(temporary, step, weights, state, facts)
                sync_folder(temporary)
                os.rename(temporary, target)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    return _existing(target, weights, state)
                raise
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            sync_folder(folder)
    except OSError as error:
        what = f"The checkpoint {target} could not be written"
        raise storage_error(what, error, "Earlier checkpoints are untouched.") from error
    return target


def prepare(folder: Location) -> None:
    """Make a run's folder if it is missing, and see that a checkpoint can be written to it: by writing a small file.

    Raises:
        StorageError: it cannot.
    """
    folder = Path(folder)
    try:
        _make_folder(folder)
        with _writing(folder):
            temporary = folder / _temporary_name("step-00000000")
            try:
                temporary.mkdir()
                with new_file(temporary / MANIFEST) as write_bytes:
                    write_bytes(bytes(_TRIAL_BYTES))
                sync_folder(temporary)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise storage_error(f"No checkpoint can be written to {folder}", error) from error


def path_of(folder: Location, step: int) -> Path:
    """Return where `write` puts a step."""
    return Path(folder) / f"step-{step:08d}"


def read(path: Location) -> Checkpoint:
    """Read one step's folder, and verify every byte of it.

    Raises:
        CheckpointError: a file is missing, damaged, or of another format; the message names it and what is wrong.
    """
    return _scan(Path(path), keep_values=True)


def load_newest(path: Location) -> tuple[Checkpoint, list[Skipped]]:
    """Read what `--resume PATH` means: one step's folder, or the newest good step of a run's folder.

    Returns:
        The checkpoint, and the newer ones that were damaged and passed over (none if PATH is one step's folder).

    Raises:
        CheckpointError: there is none, or none is good.
    """
    path = Path(path)
    if is_step(path):
        return read(path), []
    skipped: list[Skipped] = []
    for step in reversed(steps_in(path)):
        try:
            return read(step), skipped
        except CheckpointError as error:
            skipped.append(Skipped(step, str(error)))
    if not skipped:
        raise CheckpointError(
            f"There is no checkpoint in {path}. Give the folder of a run (it holds step-... folders), or one of its "
            f"step-... folders."
        )
    reasons = "\n".join(f"  {reason}" for _, reason in skipped)
    raise CheckpointError(f"All {len(skipped)} checkpoints in {path} are damaged:\n{reasons}")


def latest(folder: Location) -> Path | None:
    """Return the newest step of a run's folder that verifies, or None. Needs little memory, but reads all of it."""
    for step in reversed(steps_in(folder)):
        with contextlib.suppress(CheckpointError):
            verify(step)
            return step
    return None


def verify(path: Location) -> None:
    """Check every byte of one step's folder, in little memory.

    Raises:
        CheckpointError: as `read`.
    """
    _scan(Path(path), keep_values=False)


def steps_in(folder: Location) -> list[Path]:
    """Return the step folders of a run's folder, good or not, oldest first; none if there is no such folder.

    Raises:
        StorageError: the folder is there, but cannot be read.
    """
    try:
        with os.scandir(Path(folder)) as found:
            names = [entry.name for entry in found if entry.is_dir(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise storage_error(f"The folder {folder} cannot be read", error) from error
    return [Path(folder) / name for name in sorted(names, key=_number_of) if _number_of(name) >= 0]


def keep(folder: Location, count: int, trusted: Path | None = None) -> list[Path]:
    """Delete all but the newest `count` steps of a run's folder, and never the newest good one.

    Args:
        folder: the run's folder.
        count: how many to keep, at least 1.
        trusted: a step known to be good (what `write` has just returned), which saves reading it.

    Returns:
        The steps deleted.

    Raises:
        StorageError: one could not be deleted.
    """
    if count < 1:
        raise CheckpointError(f"You asked to keep {count} checkpoints; keep at least 1.")
    steps = steps_in(folder)
    if len(steps) <= count:
        return []
    good = trusted if trusted in steps[-count:] else latest(folder)
    old = [step for step in steps[:-count] if step not in (good, trusted)] if good else []
    try:
        with _writing(Path(folder)):
            for step in old:
                # Renamed first, so that a death in between leaves no step that looks damaged.
                doomed = step.with_name(_temporary_name(step.name))
                os.rename(step, doomed)
                sync_folder(Path(folder))
                shutil.rmtree(doomed)
    except OSError as error:
        raise storage_error(f"An old checkpoint in {folder} could not be deleted", error) from error
    return old


def set_aside(path: Location) -> Path:
    """Rename a damaged step to `damaged-step-...`, so that a resumed run can write it again; return the new path.

    Raises:
        CheckpointError: it could not be renamed.
    """
    path = Path(path)
    aside = path.with_name(f"damaged-{path.name}-{secrets.token_hex(4)}")
    try:
        os.rename(path, aside)
    except OSError as error:
        raise CheckpointError(f"The damaged checkpoint {path} could not be set aside: {error}") from error
    return aside


def _number_of(name: str) -> int:
    match = _STEP_NAME.fullmatch(name)
    return int(match[1]) if match and name == f"step-{int(match[1]):08d}" else -1


def is_step(path: Path) -> bool:
    """Return whether `path` is, or is called like, one step's folder; else it is a run's."""
    return _number_of(path.name) >= 0 or any(os.path.exists(path / name) for name in (MANIFEST, WEIGHTS))


def _temporary_name(step_name: str) -> str:
    # From the system's randomness: the generators that a recipe seeds stay as they are.
    return f".{step_name}.{os.getpid()}-{secrets.token_hex(8)}.tmp"


def _make_folder(folder: Path) -> None:
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for path in missing:
            sync_folder(path.parent)
    except OSError:
        # Else the next save would find them made, and believe that the disk knows of them.
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Hold the shared lock of [Note: lock]; sweep first if nobody else does. Without locks nothing is swept."""
    lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for name in filter(_TEMPORARY_NAME.fullmatch, os.listdir(folder)):
                shutil.rmtree(folder / name, ignore_errors=True)
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_SH)
        yield
    finally:
        # A child forked meanwhile has the descriptor too: closing ours would not unlock.
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_UN)
        with contextlib.suppress(OSError):
            os.close(lock)


def _existing(target: Path, weights: Tensors, state: Tensors) -> Path:
    try:
        verify(target)
    except CheckpointError as error:
        raise StorageError(
            f"This step was checkpointed before, and that one is damaged; it is never written over. Move {target} "
            f"away. ({error})",
            "a damaged checkpoint of the same step is in the way",
        ) from error
    manifest = read_manifest(target)
    for role, tensors, entries in (("weights", weights, manifest.weights), ("state", state, manifest.state)):
        for name in {**entries, **tensors}:
            if name not in tensors or name not in entries or tensor_digest(tensors[name]) != entries[name].digest:
                raise CheckpointError(
                    f"{target} exists and differs in {name!r} of its {role}: another run wrote it, and it is never "
                    f"written over. Give this run a folder of its own."
                )
    # Whoever published it may have failed, or died, before its name was on the disk.
    sync_folder(target.parent)
    return target


def _check(role: str, tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        if name == "__metadata__" or not isinstance(name, str) or not name.isprintable():
            raise CheckpointError(f"A tensor of the {role} is named {name!r}, which no file can hold. Rename it.")
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"{name!r} in the {role} is a {type(tensor).__name__}, not a tensor.")


def _fill(temporary: Path, step: int, weights: Tensors, state: Tensors, facts: dict[str, Any]) -> None:
    aliases = _aliases(state)
    distinct = {name: tensor for name, tensor in state.items() if name not in aliases}
    try:
        frame = wire.pack(facts)
    except TypeError as error:
        raise CheckpointError(f"The facts of this run cannot be checkpointed: {error}") from error
    weight_entries, weights_file = write_tensors(temporary / WEIGHTS, weights)
    state_entries, state_file = write_tensors(temporary / STATE, distinct)
    with new_file(temporary / FACTS) as write_facts:
        write_facts(frame)
    facts_file = {"bytes": len(frame), "digest": bytes_digest(frame)}
    manifest = {
        "format": _FORMAT,
        "version": _VERSION,
        "step": step,
        "files": {WEIGHTS: weights_file, STATE: state_file, FACTS: facts_file},
        "weights": weight_entries,
        "state": {name: {"same_as": aliases[name]} if name in aliases else state_entries[name] for name in state},
    }
    body = json.dumps(manifest, indent=1).removesuffix("\n}").encode()
    with new_file(temporary / MANIFEST) as write_manifest:
        write_manifest(body + _seal(body))


def _seal(body: bytes) -> bytes:
    """Return the last lines of a manifest: the digest of everything before them."""
    return _SEAL.format(bytes_digest(body)).encode()


class Manifest(NamedTuple):
    """The manifest; of each file, its size in bytes and its digest."""

    step: int
    files: dict[str, tuple[int, str]]
    weights: dict[str, Entry]
    state: dict[str, Entry]


def _scan(path: Path, keep_values: bool) -> Checkpoint:
    manifest = read_manifest(path)
    weights = read_tensors(path / WEIGHTS, manifest.weights, manifest.files[WEIGHTS], keep_values)
    state = read_tensors(path / STATE, manifest.state, manifest.files[STATE], keep_values)
    facts = _read_facts(path / FACTS, manifest.files[FACTS])
    digest = joined_digest((name, entry.digest) for name, entry in manifest.weights.items())
    return Checkpoint(path=path, step=manifest.step, weights=weights, state=state, facts=facts, weights_digest=digest)


def read_manifest(path: Path) -> Manifest:
    """Return the manifest of one step's folder, verified by its own digest.

    Raises:
        CheckpointError: it is missing, damaged, of another format or another step.
    """
    with opened(path / MANIFEST, MAX_JSON_BYTES) as (file, size):
        text = file.read(size)
        body = text[: -len(_seal(b""))]
        if text != body + _seal(body):
            raise ValueError("it does not match its own digest")
        raw = json.loads(text)
        if raw["format"] != _FORMAT or raw["version"] != _VERSION:
            found = f"{raw['format']!r}, version {raw['version']!r}"
            raise CheckpointError(f"{path} is of format {found}. Read it with the samestep that wrote it.")
        step = natural(raw["step"])
        if _number_of(path.name) not in (-1, step):
            raise ValueError(f"it belongs to step {step}")
        files = {name: (natural(raw["files"][name]["bytes"]), raw["files"][name]["digest"]) for name in _FILES}
        return Manifest(step, files, _parsed_entries(raw["weights"]), _parsed_entries(raw["state"]))


def _aliases(tensors: Tensors) -> dict[str, str]:
    """Return, for each name whose tensor is the very memory of an earlier one, that earlier name."""
    first_of: dict[tuple[Any, ...], str] = {}
    aliases = {}
    for name, tensor in tensors.items():
        if tensor.layout is torch.strided and tensor.numel() and not tensor.is_meta:
            view = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            first = first_of.setdefault((*view, tensor.is_conj(), tensor.is_neg()), name)
            if first != name:
                aliases[name] = first
    return aliases


def _parsed_entries(raw: Any) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for name, item in raw.items():
        if "same_as" in item:
            first = item["same_as"]
            entries[name] = entries[first]._replace(same_as=entries[first].same_as or first)
        else:
            shape = tuple(natural(size) for size in item["shape"])
            entries[name] = Entry(wire.dtype_named(item["dtype"]), shape, str(item["digest"]), None)
    return entries


def _read_facts(path: Path, expected: tuple[int, str]) -> dict[str, Any]:
    num_bytes, digest = expected
    with opened(path, num_bytes) as (file, size):
        frame = file.read(size)
        if size != num_bytes or bytes_digest(frame) != digest:
            raise ValueError("it does not match its digest")
        facts = wire.unpack(frame)
        if not isinstance(facts, dict):
            raise damaged(path, f"it holds a {type(facts).__name__}, not a dict")
        return facts
