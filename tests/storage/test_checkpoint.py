"""Checkpoints: what was written comes back to the bit, or an error names the file, whatever is flipped, cut, killed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from samestep.errors import CheckpointError
from samestep.storage import checkpoint, tensor_file
from samestep.storage.checkpoint import (
    FACTS,
    MANIFEST,
    STATE,
    WEIGHTS,
    keep,
    latest,
    load_newest,
    read,
    set_aside,
    write,
)
from samestep.storage.digest import joined_digest, pieces, state_digest, tensors_digest

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

FILES = [WEIGHTS, STATE, FACTS, MANIFEST]
COMMON = [
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e5m2",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
]
RARE = ["uint16", "uint32", "uint64", "complex32", "complex64", "complex128", "float8_e4m3fnuz", "float8_e5m2fnuz"]
FACTS_OF = {"step": 7, "loss": -0.0, "betas": (0.9, 0.999), "groups": [{"lr": 0.1, 3: None}], "rng": torch.arange(5)}


def random_bits(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    flat = torch.empty(shape, dtype=dtype).reshape(-1).view(torch.uint8)
    generator = torch.Generator().manual_seed(seed)
    flat.copy_(torch.randint(0, 2 if dtype == torch.bool else 256, flat.shape, generator=generator))
    return flat.view(dtype).reshape(shape)


def write_step(folder: Path, step: int, *, seed: int | None = None) -> Path:
    """A small checkpoint whose tensors depend on its step (or on `seed`)."""
    seed = step if seed is None else seed
    weights = {"b.weight": random_bits(torch.float32, (5, 3), seed), "a": random_bits(torch.bfloat16, (7,), seed)}
    state = {"m": random_bits(torch.float64, (4,), seed), "empty": torch.empty(0, 3), "count": torch.tensor(seed)}
    return write(folder, step=step, weights=weights, state=state, facts={**FACTS_OF, "seed": seed})


def holds(path: Path, step: int) -> bool:
    """Whether a checkpoint reads back as `write_step(folder, step)` wrote it."""
    found = read(path)
    same = torch.equal(found.weights["b.weight"].view(torch.int32), random_bits(torch.int32, (5, 3), step))
    return same and found.facts["seed"] == found.step == int(found.state["count"]) == step


def names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.name != ".lock")


# Round trips


def test_everything_comes_back(tmp_path):
    path = write_step(tmp_path / "new" / "run", 120)
    assert path == tmp_path / "new" / "run" / "step-00000120"
    assert sorted(os.listdir(path)) == sorted(FILES)
    found = read(path)
    assert (found.path, found.step) == (path, 120)
    assert list(found.weights) == ["b.weight", "a"] and list(found.state) == ["m", "empty", "count"]
    assert state_digest(found.facts) == state_digest({**FACTS_OF, "seed": 120})
    assert type(found.facts["betas"]) is tuple and found.facts["groups"] == FACTS_OF["groups"]
    assert found.weights_digest == tensors_digest(found.weights.items())
    assert holds(path, 120)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 2), (2, 0, 5)], ids=str)
def test_every_dtype(tmp_path, shape):
    tensors = {name: random_bits(getattr(torch, name), shape, seed=i) for i, name in enumerate(COMMON + RARE)}
    found = read(write(tmp_path, step=1, weights=tensors, state=tensors, facts={}))
    for group in (found.weights, found.state):
        assert {n: (t.dtype, t.shape) for n, t in group.items()} == {n: (t.dtype, t.shape) for n, t in tensors.items()}
        assert tensors_digest(group.items()) == tensors_digest(tensors.items())
        assert all(t.data_ptr() % 64 == 0 for t in group.values())
    plain = load_file(found.path / WEIGHTS)
    assert tensors_digest((n, plain[n]) for n in COMMON) == tensors_digest((n, tensors[n]) for n in COMMON)
    for name in RARE:
        assert torch.equal(plain[name].reshape(-1), tensors[name].contiguous().reshape(-1).view(torch.uint8))


def test_tensors_larger_than_a_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_file, "_PIECE_BYTES", 100)
    weights = {"x": random_bits(torch.float32, (77, 5)), "y": random_bits(torch.float32, (25,))}
    path = write(tmp_path, step=1, weights=weights, state={}, facts={})
    assert tensors_digest(read(path).weights.items()) == tensors_digest(weights.items())
    assert latest(tmp_path) == path


def test_views_and_ties(tmp_path):
    base, complex_ = torch.randn(6, 4), torch.randn(2, dtype=torch.cfloat)
    state = {"base": base, "t": base.t(), "same": base[:], "row": base[1], "c": complex_, "conj": complex_.conj()}
    state |= {"wide": torch.ones(1).expand(8), "bits": base.view(torch.int32), "e": base[:0], "f": base[:0]}
    found = read(write(tmp_path, step=1, weights=state, state=state, facts={}))
    assert list(found.state) == list(state)
    for group in (found.weights, found.state):
        assert tensors_digest(group.items()) == tensors_digest(state.items())
    assert found.state["same"] is found.state["base"]
    assert len({id(tensor) for tensor in found.state.values()}) == len(state) - 1
    assert found.weights["same"].data_ptr() != found.weights["base"].data_ptr()
    assert (found.path / STATE).stat().st_size < (found.path / WEIGHTS).stat().st_size


class Tied(torch.nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = torch.nn.Embedding(11, 4)
        self.norm = torch.nn.BatchNorm1d(4)
        self.head = torch.nn.Linear(4, 11, bias=False)
        self.head.weight = self.embedding.weight


def test_plain_torch_loads_the_weights(tmp_path):
    model, other = Tied(1), Tied(2)
    path = write(tmp_path, step=3, weights=model.state_dict(), state={}, facts={})
    other.load_state_dict(load_file(path / "weights.safetensors"), strict=True)
    assert tensors_digest(other.state_dict().items()) == tensors_digest(model.state_dict().items())
    assert other.head.weight is other.embedding.weight


def test_writing_and_reading_draw_no_random_numbers(tmp_path):
    random.seed(5), torch.manual_seed(5)
    expected = random.random(), torch.rand(1).item()
    random.seed(5), torch.manual_seed(5)
    write(tmp_path, step=1, weights={"x": torch.ones(2)}, state={}, facts={})
    load_newest(tmp_path), keep(tmp_path, 1)
    assert (random.random(), torch.rand(1).item()) == expected


# Publishing


def test_nothing_is_written_over(tmp_path, monkeypatch):
    path = write_step(tmp_path, 5)
    monkeypatch.setattr(os, "mkdir", lambda *_: pytest.fail("it was written again"))
    before = {name: ((path / name).read_bytes(), (path / name).stat().st_mtime_ns) for name in FILES}
    assert write_step(tmp_path, 5) == path
    with pytest.raises(
        CheckpointError, match=r"step-00000005 exists and differs in 'b.weight' of its weights: another"
    ):
        write_step(tmp_path, 5, seed=6)
    for tensors in ({"x": torch.ones(1)}, {}):
        with pytest.raises(CheckpointError, match="differs"):
            write(tmp_path, step=5, weights=tensors, state={}, facts={})
    assert {name: ((path / name).read_bytes(), (path / name).stat().st_mtime_ns) for name in FILES} == before
    (path / STATE).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"is damaged; it is never written over. Move .*step-00000005 away"):
        write_step(tmp_path, 5)
    monkeypatch.undo()
    aside = set_aside(path)
    assert aside.name.startswith("damaged-step-00000005") and aside.is_dir() and not path.exists()
    assert holds(write_step(tmp_path, 5), 5)
    assert names_in(tmp_path) == sorted([aside.name, "step-00000005"])


@pytest.mark.parametrize("other_seed", [5, 66], ids=["same tensors", "other tensors"])
def test_two_writers_of_one_step(tmp_path, monkeypatch, other_seed):
    """Another process publishes the same step just before our rename."""
    rename = os.rename

    def late_rename(source, target):
        monkeypatch.setattr(os, "rename", rename)
        write_step(tmp_path, 5, seed=other_seed)
        rename(source, target)

    monkeypatch.setattr(os, "rename", late_rename)
    if other_seed == 5:
        assert write_step(tmp_path, 5) == tmp_path / "step-00000005"
    else:
        with pytest.raises(CheckpointError, match="differs"):
            write_step(tmp_path, 5)
    assert read(tmp_path / "step-00000005").facts["seed"] == other_seed
    assert names_in(tmp_path) == ["step-00000005"]


BAD = {
    "reserved name": ({"weights": {"__metadata__": torch.ones(1)}}, "'__metadata__'"),
    "unprintable name": ({"state": {"a\n": torch.ones(1)}}, "named 'a"),
    "no name": ({"state": {3: torch.ones(1)}}, "named 3"),
    "no tensor": ({"weights": {"extra": {"a": 1}}}, "'extra' in the weights is a dict, not a tensor"),
    "sparse": ({"state": {"s": torch.eye(2).to_sparse()}}, "'s' cannot be checkpointed.*dense"),
    "meta": ({"weights": {"w": torch.empty(2, device="meta")}}, "'w' cannot be checkpointed"),
    "fact": ({"facts": {"scheduler": {"f": print}}}, r"facts.*value\['scheduler'\]\['f'\] is a builtin"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_saved_is_named_and_leaves_nothing(tmp_path, case):
    arguments, message = BAD[case]
    with pytest.raises(CheckpointError, match=message):
        write(tmp_path, **{"step": 1, "weights": {}, "state": {}, "facts": {}, **arguments})
    assert names_in(tmp_path) == []


SYSTEM_CALLS = ["fsync", "rename", "open", "mkdir"]


def fail_at(monkeypatch, index: int, code: int) -> list[str]:
    """Make the `index`-th of the system calls fail, once; return the list of calls made, filled as they come."""
    calls: list[str] = []

    def wrapped(name, real):
        def call(*args, **kwargs):
            calls.append(name)
            if len(calls) == index + 1:
                raise OSError(code, os.strerror(code))
            return real(*args, **kwargs)

        return call

    for name in SYSTEM_CALLS:
        monkeypatch.setattr(os, name, wrapped(name, getattr(os, name)))
    return calls


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
def test_a_failing_system_call_leaves_the_old_and_nothing_half(tmp_path, monkeypatch, code):
    index, kinds_failed = 0, set()
    while True:
        folder = tmp_path / str(index)
        write_step(folder, 1)
        with monkeypatch.context() as patch:
            calls = fail_at(patch, index, code)
            with contextlib.suppress(CheckpointError):
                write_step(folder, 2)
                # A run's folder that exists need not be made.
                if len(calls) > index and calls[index] != "mkdir":
                    pytest.fail(f"call {index}, {calls[index]}, failed unnoticed")
        if len(calls) <= index:
            break
        kinds_failed.add(calls[index])
        assert holds(folder / "step-00000001", 1)
        left = names_in(folder)
        assert left in (["step-00000001"], ["step-00000001", "step-00000002"]), (index, calls)
        assert len(left) == 1 or (calls[index] != "rename" and holds(folder / "step-00000002", 2))
        assert holds(write_step(folder, 2), 2)
        index += 1
    assert kinds_failed == set(SYSTEM_CALLS) and calls.count("fsync") == 6 and calls.count("rename") == 1


def test_a_step_that_no_name_holds_is_an_invariant(tmp_path):
    for step in (-1, 10**18):
        with pytest.raises(AssertionError):
            write_step(tmp_path, step, seed=0)
    assert names_in(tmp_path) == []


def test_a_full_disk_inside_a_file(tmp_path, monkeypatch):
    write_step(tmp_path, 1)

    def full(tensor):
        yield next(pieces(tensor))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(tensor_file, "pieces", full)
        with pytest.raises(CheckpointError, match="step-00000002 could not be written: .*No space left.*untouched"):
            write_step(tmp_path, 2)
    assert names_in(tmp_path) == ["step-00000001"] and holds(tmp_path / "step-00000001", 1)


def test_the_order_that_outlives_a_power_cut(tmp_path, monkeypatch):
    """Every file is synced whole, the manifest last; then their folder; then one rename; then the parents."""
    events = []
    fsync, rename = os.fsync, os.rename

    def seen_fsync(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        events.append((path.parent.name if path.is_file() else "", path.name, os.fstat(descriptor).st_size))
        fsync(descriptor)

    def seen_rename(source, target):
        events.append(("rename", Path(source).name, Path(target).name))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "rename", seen_rename)
    path = write_step(tmp_path / "runs" / "x", 2)
    temporary = next(source for kind, source, _ in events if kind == "rename")
    assert [event[:2] for event in events] == [
        ("", "runs"),
        ("", tmp_path.name),
        (temporary, WEIGHTS),
        (temporary, STATE),
        (temporary, FACTS),
        (temporary, MANIFEST),
        ("", temporary),
        ("rename", temporary),
        ("", "x"),
    ]
    assert [size for folder, name, size in events if name in FILES] == [(path / name).stat().st_size for name in FILES]


def test_a_folder_whose_name_may_not_be_on_the_disk_is_unmade(tmp_path, monkeypatch):
    """Else the next save would find it made, and never sync its parent."""
    fsync, synced = os.fsync, []

    def failing(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises(CheckpointError, match="EIO"):
            write_step(tmp_path / "runs" / "x", 1)
    assert names_in(tmp_path) == []

    def seen(descriptor):
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", seen)
    write_step(tmp_path / "runs" / "x", 1)
    assert {str(tmp_path), str(tmp_path / "runs")} < set(synced)


def test_a_step_published_but_not_synced_is_synced_by_the_next_try(tmp_path, monkeypatch):
    fsync, synced = os.fsync, []

    def failing(descriptor):
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        if synced[-1] == str(tmp_path):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        for _ in range(2):
            with pytest.raises(CheckpointError, match="EIO"):
                write_step(tmp_path, 1)
    assert synced.count(str(tmp_path)) == 2 and holds(tmp_path / "step-00000001", 1)


def test_an_error_on_closing_a_file_is_an_error(tmp_path, monkeypatch):
    """A full quota on a network file system is told only there."""
    close = os.close

    def failing(descriptor):
        is_data = os.readlink(f"/proc/self/fd/{descriptor}").endswith(STATE)
        close(descriptor)
        if is_data:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "close", failing)
    with pytest.raises(CheckpointError, match=r"step-00000001 could not be written: .*\(EDQUOT\).* Free space"):
        write_step(tmp_path, 1)
    assert names_in(tmp_path) == []


NURSERY = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from samestep.storage import checkpoint, tensor_file
torch.set_num_threads(1)
folder, mode, first, last = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])

def step_of(folder, step):
    weights = {str(i): torch.full((300, 5), step * 10 + i) for i in range(4)}
    checkpoint.write(folder, step=step, weights=weights, state={"s": torch.full((999,), step)}, facts={"step": step})

def die_at(index):
    # SIGKILL at the index-th system call, or piece of a tensor, or just after it.
    count = [0]
    def wrap(real):
        def call(*args, **kwargs):
            count[0] += 1
            if count[0] == index: os.kill(os.getpid(), signal.SIGKILL)
            out = real(*args, **kwargs)
            count[0] += 1
            if count[0] == index: os.kill(os.getpid(), signal.SIGKILL)
            return out
        return call
    for name in ("fsync", "rename", "open", "mkdir", "close"):
        setattr(os, name, wrap(getattr(os, name)))
    real_pieces = tensor_file.pieces
    def dying_pieces(tensor):
        for piece in real_pieces(tensor):
            half = len(piece) // 2
            yield piece[:half]
            count[0] += 1
            if count[0] == index: os.kill(os.getpid(), signal.SIGKILL)
            yield piece[half:]
    tensor_file.pieces = dying_pieces

def run_child(work):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work(writer)
        finally:
            os._exit(0)
    os.close(writer)
    return child, reader

def check(run, acknowledged):
    found, skipped = checkpoint.load_newest(run)
    assert not skipped, skipped
    assert acknowledged <= found.step <= acknowledged + 1, (acknowledged, found.step)
    assert found.facts["step"] == found.step and (found.weights["2"] == found.step * 10 + 2).all()
    num_left = sum(name.endswith(".tmp") for name in os.listdir(run))
    assert num_left <= 1, os.listdir(run)
    step_of(run, found.step + 1)
    assert checkpoint.load_newest(run)[0].step == found.step + 1
    assert not any(name.endswith(".tmp") for name in os.listdir(run)), os.listdir(run)
    return num_left

num_killed = num_torn = 0
for index in range(first, last):
    run = folder / f"{mode}-{index}"
    step_of(run, 1)
    def work(writer):
        if mode == "calls":
            die_at(index)
            step_of(run, 2)
            os.kill(os.getpid(), signal.SIGTERM)
        for step in range(2, 10**6):
            step_of(run, step)
            os.write(writer, b"x")
    child, reader = run_child(work)
    if mode == "moments":
        os.read(reader, 1)
        time.sleep(random.Random(index).random() * 0.02)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    acknowledged = 1 + (mode == "moments")
    while data := os.read(reader, 65536):
        acknowledged += len(data)
    os.close(reader)
    if mode == "calls" and os.WTERMSIG(status) == signal.SIGTERM:
        assert checkpoint.load_newest(run)[0].step == 2
        break
    assert os.WTERMSIG(status) == signal.SIGKILL, status
    num_killed += 1
    num_torn += check(run, acknowledged)
print(num_killed, num_torn)
"""


@pytest.mark.parametrize(("mode", "first", "last"), [("calls", 1, 1000), ("moments", 0, 25)])
def test_killed_at_any_instant(tmp_path, mode, first, last):
    """SIGKILL at every system call of a write, and at random moments of a loop of writes."""
    source = str(Path(checkpoint.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", NURSERY, str(tmp_path), mode, str(first), str(last)],
        env={**os.environ, "PYTHONPATH": source},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    num_killed, num_torn = map(int, done.stdout.split())
    assert num_killed >= 25
    assert mode == "moments" or num_torn > 10, "most kills fall inside the write"


# Damage


@pytest.fixture
def two_steps(tmp_path):
    write_step(tmp_path, 1)
    write_step(tmp_path, 2)
    return tmp_path


def assert_found(folder: Path, culprit: str) -> None:
    """The damage of step 2 is found by every reader, the file named, and step 1 taken instead."""
    with pytest.raises(CheckpointError, match=culprit):
        read(folder / "step-00000002")
    with pytest.raises(CheckpointError, match=culprit):
        load_newest(folder / "step-00000002")
    found, skipped = load_newest(folder)
    assert found.step == 1 and holds(found.path, 1)
    assert [path.name for path, _ in skipped] == ["step-00000002"] and culprit in skipped[0].reason
    assert latest(folder) == found.path


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_found(two_steps, name):
    path = two_steps / "step-00000002" / name
    good = path.read_bytes()
    rng = random.Random(name)
    for position in sorted({0, 7, 8, len(good) - 1, *(rng.randrange(len(good)) for _ in range(100))}):
        flipped = bytearray(good)
        flipped[position] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match=name):
            read(path.parent)
    assert_found(two_steps, name)
    path.write_bytes(good)
    assert holds(path.parent, 2)


@pytest.mark.parametrize("name", FILES)
def test_every_cut_or_growth_is_found(two_steps, name):
    path = two_steps / "step-00000002" / name
    good = path.read_bytes()
    rng = random.Random(name)
    for size in {0, 1, 8, len(good) - 1, *(rng.randrange(len(good)) for _ in range(30))}:
        path.write_bytes(good[:size])
        with pytest.raises(CheckpointError, match=name):
            read(path.parent)
    for more in (b"\0", b"\n", b" ", good):
        path.write_bytes(good + more)
        assert_found(two_steps, name)


@pytest.mark.parametrize("name", FILES)
def test_what_stands_in_a_files_place_is_found(two_steps, name):
    path = two_steps / "step-00000002" / name
    path.unlink()
    assert_found(two_steps, name)
    path.mkdir()
    assert_found(two_steps, name)
    path.rmdir()
    os.mkfifo(path)
    assert_found(two_steps, name)
    path.unlink()
    path.symlink_to(path)
    assert_found(two_steps, name)
    path.unlink()
    path.symlink_to("/dev/zero")
    assert_found(two_steps, name)


def test_swapped_files_and_folders_are_found(two_steps):
    one, two = two_steps / "step-00000001", two_steps / "step-00000002"
    good = {name: (two / name).read_bytes() for name in FILES}
    for name in FILES:
        (two / name).write_bytes((one / name).read_bytes())
        assert_found(two_steps, MANIFEST if name == MANIFEST else name)
        (two / name).write_bytes(good[name])
    (two / WEIGHTS).write_bytes(good[STATE])
    (two / STATE).write_bytes(good[WEIGHTS])
    assert_found(two_steps, WEIGHTS)
    shutil.rmtree(two)
    shutil.copytree(one, two)
    assert_found(two_steps, MANIFEST)
    shutil.copytree(one, two_steps / "best")
    assert holds(two_steps / "best", 1) and load_newest(two_steps / "best")[0].step == 1


def resealed(path: Path, edit) -> None:
    """Edit the manifest as someone would who can also compute its digest."""
    raw = json.loads((path / MANIFEST).read_text())
    del raw["digest"]
    edited = edit(raw)
    body = json.dumps(edited if isinstance(edited, list) else raw, indent=1).removesuffix("\n}").encode()
    body = body.replace(b'"DEEP"', b"[" * 200_000)
    digest = hashlib.sha256(body).hexdigest()[:32]
    (path / MANIFEST).write_bytes(body + f',\n "digest": "{digest}"\n}}\n'.encode())


HOSTILE = {
    "nothing wrong": lambda m: None,
    "other format": lambda m: m.update(format="zip"),
    "later version": lambda m: m.update(version=m["version"] + 1),
    "no step": lambda m: m.pop("step"),
    "negative step": lambda m: m.update(step=-1),
    "a list": lambda m: [m],
    "no files": lambda m: m.pop("files"),
    "files a list": lambda m: m.update(files=[]),
    "weights a list": lambda m: m.update(weights=[1]),
    "an entry a number": lambda m: m["weights"].update(a=7),
    "huge file": lambda m: m["files"][FACTS].update(bytes=1 << 62),
    "huge tensor": lambda m: m["weights"]["a"].update(shape=[1 << 62]),
    "overflowing tensor": lambda m: m["weights"]["a"].update(shape=[1 << 62] * 9),
    "endless shape": lambda m: m["state"]["empty"].update(shape=[0, 1 << 62, 1 << 62]),
    "negative shape": lambda m: m["weights"]["a"].update(shape=[-7]),
    "float shape": lambda m: m["weights"]["a"].update(shape=[7.0]),
    "bool shape": lambda m: m["state"]["count"].update(shape=[True]),
    "text shape": lambda m: m["weights"]["a"].update(shape="7"),
    "no dtype": lambda m: m["weights"]["a"].update(dtype="load"),
    "odd dtype": lambda m: m["weights"]["a"].update(dtype=["float32"]),
    "other dtype": lambda m: m["weights"]["a"].update(dtype="float16"),
    "other shape": lambda m: m["weights"]["b.weight"].update(shape=[3, 5]),
    "other digest": lambda m: m["weights"]["a"].update(digest="0" * 32),
    "digest a list": lambda m: m["files"][STATE].update(digest=[]),
    "a name more": lambda m: m["weights"].update(c=m["weights"]["a"]),
    "a name less": lambda m: m["weights"].pop("a"),
    "unknown alias": lambda m: m["state"].update(x={"same_as": "y"}),
    "alias of itself": lambda m: m["state"].update(x={"same_as": "x"}),
    "alias of a list": lambda m: m["state"].update(x={"same_as": []}),
    "deep": lambda m: m.update(step="DEEP"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_manifest_is_refused(two_steps, case):
    path = two_steps / "step-00000002"
    resealed(path, HOSTILE[case])
    if case == "nothing wrong":
        assert holds(path, 2)
    else:
        assert_found(two_steps, path.name)


def test_an_alias_of_an_alias_is_followed(two_steps):
    path = two_steps / "step-00000002"
    resealed(path, lambda m: m["state"].update(x={"same_as": "m"}, y={"same_as": "x"}))
    state = read(path).state
    assert state["y"] is state["x"] is state["m"]


HEADERS = {
    "claims more than the file": lambda h: ((1 << 40).to_bytes(8, "little"), None),
    "claims a little more": lambda h: ((len(h) + 8).to_bytes(8, "little"), None),
    "no JSON": lambda h: (None, b"{" + b" " * (len(h) - 1)),
    "a list": lambda h: (None, b"[]".ljust(len(h))),
    "overlap": lambda h: (None, h.replace(b"[0,60]", b"[0,59]")),
    "other order": lambda h: (None, h.replace(b"[60,74]", b"[0,14] ")),
    "deep": lambda h: (None, b"[" * len(h)),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_hostile_tensor_file_is_refused(two_steps, case):
    path = two_steps / "step-00000002" / WEIGHTS
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    length, header = HEADERS[case](content[8 : 8 + size])
    path.write_bytes((length or content[:8]) + (header or content[8 : 8 + size]) + content[8 + size :])
    assert path.stat().st_size == len(content) and path.read_bytes() != content
    assert_found(two_steps, WEIGHTS)


FORGED = {
    "nothing wrong": lambda h, data: data,
    "offsets of each other": lambda h, data: h["a"].update(data_offsets=[0, 14]),
    "offsets not numbers": lambda h, data: h["a"].update(data_offsets=["60", "74"]),
    "another dtype": lambda h, data: h["a"].update(dtype="F16"),
    "another shape": lambda h, data: h["b.weight"].update(shape=[3, 5]),
    "a hidden tail": lambda h, data: data + b"more",
    "a tensor cut": lambda h, data: data[:-1],
}


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_header_is_refused_though_every_digest_fits(two_steps, case):
    """Other readers of the file would see other tensors than the digests tell."""
    path = two_steps / "step-00000002"
    content = (path / WEIGHTS).read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    data = FORGED[case](header, data) or data
    text = json.dumps(header).encode()
    start = len(text).to_bytes(8, "little") + text
    (path / WEIGHTS).write_bytes(start + data)

    def refit(manifest):
        digests = [(name, manifest["weights"][name]["digest"]) for name in ("b.weight", "a")]
        digest = joined_digest([("header", hashlib.sha256(start).hexdigest()[:32]), *digests])
        manifest["files"][WEIGHTS] = {"bytes": len(start + data), "digest": digest}

    resealed(path, refit)
    if case == "nothing wrong":
        assert holds(path, 2)
    else:
        assert_found(two_steps, WEIGHTS)


def test_an_undecodable_frame_is_refused(two_steps):
    path = two_steps / "step-00000002"
    for frame in (b"", b"x", (1 << 60).to_bytes(8, "little"), b"\2" + bytes(7) + b"[]"):
        (path / FACTS).write_bytes(frame)
        entry = {"bytes": len(frame), "digest": hashlib.sha256(frame).hexdigest()[:32]}
        resealed(path, lambda m, entry=entry: m["files"].update({FACTS: entry}))
        assert_found(two_steps, FACTS)


# Which one


def test_where_there_is_none(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        assert latest(path) is None
        with pytest.raises(CheckpointError, match=f"no checkpoint in {path}"):
            load_newest(path)
    with pytest.raises(CheckpointError, match="step-00000003.*missing"):
        load_newest(tmp_path / "step-00000003")


def test_the_newest_is_by_number_and_only_folders_count(tmp_path):
    for step in (99_999_999, 100_000_000, 7):
        write_step(tmp_path, step)
    (tmp_path / "step-999999999").write_text("a file")
    (tmp_path / "step-99999999999").symlink_to(tmp_path / "step-00000007")
    for name in ("step-9", "step-0999999999", ".step-900000000.1-0123456789abcdef.tmp", "damaged-step-900000000"):
        (tmp_path / name).mkdir()
    found, skipped = load_newest(str(tmp_path))
    assert (found.step, skipped) == (100_000_000, [])
    assert latest(tmp_path) == found.path == tmp_path / "step-100000000"
    assert [p.name for p in checkpoint.steps_in(tmp_path)] == ["step-00000007", "step-99999999", "step-100000000"]


def test_all_damaged(two_steps):
    for step in (1, 2):
        (two_steps / f"step-0000000{step}" / FACTS).unlink()
    assert latest(two_steps) is None
    with pytest.raises(
        CheckpointError, match=r"All 2 checkpoints in .*\n.*00002/facts.*missing.*\n.*00001/facts.*missing"
    ):
        load_newest(two_steps)


def test_keep_deletes_the_oldest(tmp_path):
    for step in (1, 2, 3, 4):
        write_step(tmp_path, step)
    assert keep(tmp_path, 9) == [] and keep(tmp_path, 4) == []
    assert [path.name for path in keep(tmp_path, 2)] == ["step-00000001", "step-00000002"]
    assert names_in(tmp_path) == ["step-00000003", "step-00000004"]
    with pytest.raises(CheckpointError, match="keep 0"):
        keep(tmp_path, 0)


def test_keep_never_deletes_the_newest_good_one(tmp_path):
    for step in (1, 2, 3, 4):
        write_step(tmp_path, step)
    for step in (3, 4):
        (tmp_path / f"step-0000000{step}" / STATE).write_bytes(b"")
    assert [path.name for path in keep(tmp_path, 1)] == ["step-00000001", "step-00000003"]
    assert names_in(tmp_path) == ["step-00000002", "step-00000004"] and holds(tmp_path / "step-00000002", 2)
    (tmp_path / "step-00000002" / STATE).write_bytes(b"")
    assert keep(tmp_path, 1) == [] and len(names_in(tmp_path)) == 2


def test_keep_never_deletes_what_was_just_written(tmp_path, monkeypatch):
    first, second, third = (write_step(tmp_path, step) for step in (1, 2, 3))
    (third / WEIGHTS).unlink()
    assert keep(tmp_path, 1, trusted=first) == [] and first.exists() and second.exists()
    monkeypatch.setattr(checkpoint, "verify", lambda path: pytest.fail("it was read, though trusted"))
    assert keep(tmp_path, 1, trusted=third) == [first, second]


def test_a_deletion_that_fails_leaves_no_torn_step(tmp_path, monkeypatch):
    for step in (1, 2):
        write_step(tmp_path, step)

    def torn(path, **_):
        (Path(path) / STATE).unlink()
        raise OSError(errno.EIO, "broken")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", torn)
        with pytest.raises(CheckpointError, match="could not be deleted: .*broken"):
            keep(tmp_path, 1)
    found, skipped = load_newest(tmp_path)
    assert (found.step, skipped) == (2, []) and len(names_in(tmp_path)) == 2
    write_step(tmp_path, 3)
    assert names_in(tmp_path) == ["step-00000002", "step-00000003"]


# Leftovers


def test_leftovers_are_removed_unless_a_writer_lives(tmp_path):
    write_step(tmp_path, 1)
    left = tmp_path / ".step-00000002.4242-0123456789abcdef.tmp"
    mine = [tmp_path / name for name in (".step-00000002.mine", "step-00000002.tmp", ".hidden.tmp")]
    for path in (left, *mine):
        path.mkdir()
        (path / "data").write_text("x")
    with open(tmp_path / ".lock") as other_writer:
        fcntl.flock(other_writer, fcntl.LOCK_SH)
        write_step(tmp_path, 2)
        assert left.exists()
    write_step(tmp_path, 3)
    assert not left.exists() and all(path.exists() for path in mine)


@pytest.mark.parametrize("others", [0, 1])
def test_a_writer_holds_a_shared_lock(tmp_path, monkeypatch, others):
    """Whether or not another writer was there first: more may come, and nobody may sweep."""
    write_step(tmp_path, 1)
    with contextlib.ExitStack() as locks:
        first = [locks.enter_context(open(tmp_path / ".lock")) for _ in range(others)]
        for lock in first:
            fcntl.flock(lock, fcntl.LOCK_SH)

        def observed(tensor):
            for lock in first:
                fcntl.flock(lock, fcntl.LOCK_UN)
            with open(tmp_path / ".lock") as another:
                with pytest.raises(BlockingIOError):
                    fcntl.flock(another, fcntl.LOCK_EX | fcntl.LOCK_NB)
                fcntl.flock(another, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return pieces(tensor)

        monkeypatch.setattr(tensor_file, "pieces", observed)
        assert holds(write_step(tmp_path, 2), 2)


def test_the_lock_is_free_afterwards_even_if_a_child_was_forked(tmp_path, monkeypatch):
    """A child forked during the write still has the descriptor; it must not hold up the next sweep."""
    inherited = []
    monkeypatch.setattr(tensor_file, "pieces", lambda t: (inherited.append(os.dup(locks_open()[0])), *pieces(t))[1:])

    def locks_open():
        links = [(int(fd), Path(f"/proc/self/fd/{fd}")) for fd in os.listdir("/proc/self/fd")]
        return [fd for fd, link in links if link.exists() and link.resolve() == tmp_path / ".lock"]

    write(tmp_path, step=1, weights={"x": torch.ones(1)}, state={}, facts={})
    try:
        assert inherited and set(locks_open()) == set(inherited)
        with open(tmp_path / ".lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        for descriptor in inherited:
            os.close(descriptor)


def test_without_locks_it_still_writes_and_sweeps_nothing(tmp_path, monkeypatch):
    left = tmp_path / ".step-00000002.4242-0123456789abcdef.tmp"
    left.mkdir()

    def unsupported(*_):
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    assert holds(write_step(tmp_path, 1), 1) and left.exists()


def test_reading_keeps_no_descriptor(two_steps):
    before = set(os.listdir("/proc/self/fd"))
    (two_steps / "step-00000002" / STATE).write_bytes(b"x")
    load_newest(two_steps), latest(two_steps), write_step(two_steps, 3)
    assert len(os.listdir("/proc/self/fd")) == len(before)
