"""Checkpoints: folders of plain files, published whole by one rename, verified to the last byte when read.

    runs/x/step-00000120/
        weights.safetensors     the model's state_dict, loadable by plain torch
        state.safetensors       every other tensor
        facts.frame             every plain value, as a frame of `core.wire`
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
import hashlib
import io
import json
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import torch

from samestep.core import wire
from samestep.core.digest import DIGEST_CHARS, TensorHasher, joined_digest, pieces, tensor_digest
from samestep.errors import CheckpointError

WEIGHTS = "weights.safetensors"
STATE = "state.safetensors"
FACTS = "facts.frame"
MANIFEST = "manifest.json"
_FILES = (WEIGHTS, STATE, FACTS)

_FORMAT = "samestep checkpoint"
_VERSION = 1
_LOCK = ".lock"
_STEP_NAME = re.compile(r"step-(\d{8,18})")
_TEMPORARY_NAME = re.compile(r"\.step-\d{8,18}\.\d+-[0-9a-f]{16}\.tmp")
_SEAL = ',\n "digest": "{}"\n}}\n'
_MAX_JSON_BYTES = 1 << 28
_PIECE_BYTES = 4 << 20
_ALIGNMENT = 64

Location: TypeAlias = str | os.PathLike[str]
Tensors: TypeAlias = Mapping[str, torch.Tensor]

# fmt: off
_CODES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}
# fmt: on
"""What every reader of safetensors knows. Other dtypes are stored as their bytes: U8 with one more dimension."""


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
        CheckpointError: it could not be written, or the step exists and is damaged or holds something else.
    """
    folder = Path(folder)
    target = folder / f"step-{step:08d}"
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
                _sync_folder(temporary)
                os.rename(temporary, target)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    return _existing(target, weights, state)
                raise
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            _sync_folder(folder)
    except OSError as error:
        raise CheckpointError(
            f"The checkpoint {target} could not be written: {error}. Earlier checkpoints are untouched. Free space "
            f"there, or choose another folder, and resume."
        ) from error
    return target


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
    if _is_step(path):
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
    """Return the step folders of a run's folder, good or not, oldest first."""
    try:
        with os.scandir(Path(folder)) as found:
            names = [entry.name for entry in found if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []
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
        CheckpointError: one could not be deleted.
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
                _sync_folder(Path(folder))
                shutil.rmtree(doomed)
    except OSError as error:
        raise CheckpointError(f"An old checkpoint in {folder} could not be deleted: {error}") from error
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


def _is_step(path: Path) -> bool:
    return _number_of(path.name) >= 0 or (path / MANIFEST).exists() or (path / WEIGHTS).exists()


def _temporary_name(step_name: str) -> str:
    # From the system's randomness: the generators that a recipe seeds stay as they are.
    return f".{step_name}.{os.getpid()}-{secrets.token_hex(8)}.tmp"


def _make_folder(folder: Path) -> None:
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        _sync_folder(path.parent)


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
        os.close(lock)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems have no fsync for folders; their renames are as durable as they get.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _existing(target: Path, weights: Tensors, state: Tensors) -> Path:
    try:
        verify(target)
    except CheckpointError as error:
        raise CheckpointError(
            f"This step was checkpointed before, and that one is damaged; it is never written over. Move {target} "
            f"away and resume. ({error})"
        ) from error
    manifest = _read_manifest(target)
    for role, tensors, entries in (("weights", weights, manifest.weights), ("state", state, manifest.state)):
        for name in {**entries, **tensors}:
            if name not in tensors or name not in entries or tensor_digest(tensors[name]) != entries[name].digest:
                raise CheckpointError(
                    f"{target} exists and differs in {name!r} of its {role}: another run wrote it, and it is never "
                    f"written over. Give this run a folder of its own."
                )
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
    weight_entries, weights_file = _write_tensors(temporary / WEIGHTS, weights)
    state_entries, state_file = _write_tensors(temporary / STATE, distinct)
    with _new_file(temporary / FACTS) as file:
        file.write(frame)
    facts_file = {"bytes": len(frame), "digest": _bytes_digest(frame)}
    manifest = {
        "format": _FORMAT,
        "version": _VERSION,
        "step": step,
        "files": {WEIGHTS: weights_file, STATE: state_file, FACTS: facts_file},
        "weights": weight_entries,
        "state": {name: {"same_as": aliases[name]} if name in aliases else state_entries[name] for name in state},
    }
    body = json.dumps(manifest, indent=1).removesuffix("\n}").encode()
    with _new_file(temporary / MANIFEST) as file:
        file.write(body + _seal(body))


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    with open(path, "xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


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


def _write_tensors(path: Path, tensors: Tensors) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write a safetensors file, piece by piece; return the manifest's entries of its tensors and of the file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))  # so each starts on its item size
    end = 0
    for name in order:
        code, shape = _stored(tensors[name].dtype, tuple(tensors[name].shape))
        begin, end = end, end + tensors[name].numel() * tensors[name].itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    start = len(text).to_bytes(8, "little") + text
    digests: dict[str, str] = {}
    with _new_file(path) as file:
        file.write(start)
        for name in order:
            tensor = tensors[name]
            hasher = TensorHasher(tensor.dtype, tensor.shape)
            try:
                for piece in pieces(tensor):
                    hasher.update(piece)
                    file.write(piece)
            except TypeError as error:
                raise CheckpointError(f"The tensor {name!r} cannot be checkpointed. {error}") from error
            digests[name] = hasher.digest()
    entries = {
        name: {"dtype": wire.name_of(tensor.dtype), "shape": list(tensor.shape), "digest": digests[name]}
        for name, tensor in tensors.items()
    }
    return entries, {"bytes": len(start) + end, "digest": _file_digest(start, digests.items())}


def _stored(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """Return the safetensors dtype and shape under which a tensor is stored."""
    code = _CODES.get(wire.name_of(dtype))
    return (code, shape) if code else ("U8", (*shape, dtype.itemsize))


def _file_digest(start: bytes, digests: Iterable[tuple[str, str]]) -> str:
    """Return a digest of a whole tensor file without reading its tensors twice: its header, then their digests."""
    return joined_digest([("header", _bytes_digest(start)), *digests])


def _bytes_digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:DIGEST_CHARS]


def _seal(body: bytes) -> bytes:
    """Return the last lines of a manifest: the digest of everything before them."""
    return _SEAL.format(_bytes_digest(body)).encode()


class _Entry(NamedTuple):
    """One tensor, by the manifest."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    digest: str
    same_as: str | None

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class _Manifest(NamedTuple):
    """The manifest; of each file, its size in bytes and its digest."""

    step: int
    files: dict[str, tuple[int, str]]
    weights: dict[str, _Entry]
    state: dict[str, _Entry]


def _scan(path: Path, keep_values: bool) -> Checkpoint:
    manifest = _read_manifest(path)
    weights = _read_tensors(path / WEIGHTS, manifest.weights, manifest.files[WEIGHTS], keep_values)
    state = _read_tensors(path / STATE, manifest.state, manifest.files[STATE], keep_values)
    facts = _read_facts(path / FACTS, manifest.files[FACTS])
    digest = joined_digest((name, entry.digest) for name, entry in manifest.weights.items())
    return Checkpoint(path=path, step=manifest.step, weights=weights, state=state, facts=facts, weights_digest=digest)


@contextlib.contextmanager
def _opened(path: Path, max_bytes: int) -> Iterator[tuple[io.BufferedReader, int]]:
    """Open a file of the checkpoint; yield it and its size. Whatever goes wrong inside becomes a CheckpointError."""
    try:
        # A pipe in a file's place must not block.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise _damaged(path, "it is not a regular file")
            if status.st_size > max_bytes:
                raise _damaged(path, f"it has {status.st_size} bytes, more than {max_bytes}")
            yield file, status.st_size
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        raise _damaged(path, "it is missing" if missing else f"it cannot be read ({error})") from error
    except CheckpointError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise _damaged(path, f"it cannot be understood ({error})") from error


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"The checkpoint file {path} is damaged: {what}.")


def _read_manifest(path: Path) -> _Manifest:
    with _opened(path / MANIFEST, _MAX_JSON_BYTES) as (file, size):
        text = file.read(size)
        body = text[: -len(_seal(b""))]
        if text != body + _seal(body):
            raise ValueError("it does not match its own digest")
        raw = json.loads(text)
        if raw["format"] != _FORMAT or raw["version"] != _VERSION:
            found = f"{raw['format']!r}, version {raw['version']!r}"
            raise CheckpointError(f"{path} is of format {found}. Read it with the samestep that wrote it.")
        step = _natural(raw["step"])
        if _number_of(path.name) not in (-1, step):
            raise ValueError(f"it belongs to step {step}")
        files = {name: (_natural(raw["files"][name]["bytes"]), raw["files"][name]["digest"]) for name in _FILES}
        return _Manifest(step, files, _parsed_entries(raw["weights"]), _parsed_entries(raw["state"]))


def _natural(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{value!r} is not a size or count")
    return value


def _parsed_entries(raw: Any) -> dict[str, _Entry]:
    entries: dict[str, _Entry] = {}
    for name, item in raw.items():
        if "same_as" in item:
            first = item["same_as"]
            entries[name] = entries[first]._replace(same_as=entries[first].same_as or first)
        else:
            shape = tuple(_natural(size) for size in item["shape"])
            entries[name] = _Entry(wire.dtype_named(item["dtype"]), shape, str(item["digest"]), None)
    return entries


def _read_tensors(
    path: Path, entries: dict[str, _Entry], expected: tuple[int, str], keep_values: bool
) -> dict[str, torch.Tensor]:
    """Verify a tensor file against the manifest and return its tensors (none unless `keep_values`)."""
    num_bytes, digest = expected
    stored = {name: entry for name, entry in entries.items() if entry.same_as is None}
    tensors = {}
    with _opened(path, num_bytes) as (file, size):
        if size != num_bytes:
            raise ValueError(f"it has {size} bytes, not {num_bytes}")
        start, order = _read_header(file, stored, num_bytes)
        for name in order:
            memory, found = _read_tensor(file, stored[name], keep_values)
            if found != stored[name].digest:
                raise ValueError(f"the tensor {name!r} does not match its digest")
            if memory is not None:
                tensors[name] = memory
        if _file_digest(start, ((name, stored[name].digest) for name in order)) != digest:
            raise ValueError("its header does not match the manifest")
    return {name: tensors[entry.same_as or name] for name, entry in entries.items()} if keep_values else {}


def _read_header(file: io.BufferedReader, entries: dict[str, _Entry], num_bytes: int) -> tuple[bytes, list[str]]:
    """Return the bytes before the tensors, and the names of the tensors in the order of the file."""
    length = int.from_bytes(file.read(8), "little")
    if length > min(_MAX_JSON_BYTES, num_bytes - 8):
        raise ValueError(f"its header claims {length} bytes")
    text = file.read(length)
    header = json.loads(text)
    header.pop("__metadata__", None)
    if set(header) != set(entries):
        raise ValueError("it holds other tensors than the manifest says")
    end = 0
    for name in header:
        entry, item = entries[name], header[name]
        begin, end = end, end + entry.num_bytes
        if item["data_offsets"] != [begin, end]:
            raise ValueError(f"the tensor {name!r} does not lie where its shape says")
        if (item["dtype"], tuple(item["shape"])) != _stored(entry.dtype, entry.shape):
            raise ValueError(f"the tensor {name!r} has another dtype or shape than the manifest says")
    if 8 + length + end != num_bytes:
        raise ValueError("its tensors do not fill it")
    return length.to_bytes(8, "little") + text, list(header)


def _read_tensor(file: io.BufferedReader, entry: _Entry, keep_value: bool) -> tuple[torch.Tensor | None, str]:
    """Read a tensor's bytes; return it, or None if not wanted, and the digest of what was read."""
    hasher = TensorHasher(entry.dtype, entry.shape)
    num_bytes = entry.num_bytes
    memory = torch.empty(num_bytes if keep_value else min(num_bytes, _PIECE_BYTES), dtype=torch.uint8)
    view = memory.numpy().data
    for begin in range(0, num_bytes, _PIECE_BYTES):
        size = min(_PIECE_BYTES, num_bytes - begin)
        piece = view[begin : begin + size] if keep_value else view[:size]
        if file.readinto(piece) != size:
            raise ValueError("it ends early")
        hasher.update(piece)
    return memory.view(entry.dtype).reshape(entry.shape) if keep_value else None, hasher.digest()


def _read_facts(path: Path, expected: tuple[int, str]) -> dict[str, Any]:
    num_bytes, digest = expected
    with _opened(path, num_bytes) as (file, size):
        frame = file.read(size)
        if size != num_bytes or _bytes_digest(frame) != digest:
            raise ValueError("it does not match its digest")
        facts = wire.unpack(frame)
        if not isinstance(facts, dict):
            raise _damaged(path, f"it holds a {type(facts).__name__}, not a dict")
        return facts
