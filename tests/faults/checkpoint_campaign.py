"""Campaigns against checkpoints: kills, failing disks, power cuts, damage. Run by hand for the long form:

    python -m tests.faults.checkpoint_campaign --cases 20000

What must hold, whatever happens: every folder called step-... is whole or found to be damaged, the newest good
checkpoint loads and is a complete old or new one, and the next save works.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import platform
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent))
from power_cut import Disk, Recorder
from system_calls import ALLOCATES, CHANGES, Failing, Short, intercepted

from samestep.errors import CheckpointError, StorageError
from samestep.storage import checkpoint
from samestep.storage.checkpoint import FACTS, MANIFEST, STATE, WEIGHTS
from samestep.storage.digest import tensors_digest

FILES = (WEIGHTS, STATE, FACTS, MANIFEST)
KEPT = 3
CODES = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.EACCES)
REFUSED = {code: ALLOCATES if code in (errno.ENOSPC, errno.EDQUOT) else CHANGES for code in CODES}


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Let fsync return at once: here processes die and calls fail, but no real power."""
    real, os.fsync = os.fsync, lambda descriptor: None
    try:
        yield
    finally:
        os.fsync = real


def tensors_of(step: int) -> dict[str, torch.Tensor]:
    """A small model's weights; two of them have one size, and one never changes."""
    generator = torch.Generator().manual_seed(step)
    return {
        "first.weight": torch.randn(24, 24, generator=generator),
        "second.weight": torch.randn(24, 24, generator=generator),
        "bias": torch.randn(24, generator=generator, dtype=torch.float64),
        "constant": torch.arange(200),
    }


def save(folder: Path, step: int) -> Path:
    """Write a checkpoint, as a run does."""
    state = {f"m.{name}": tensor * 2 for name, tensor in tensors_of(step).items()}
    facts = {"step": step, "losses": [1 / (step + i) for i in range(40)]}
    return checkpoint.write(folder, step=step, weights=tensors_of(step), state=state, facts=facts)


def save_and_keep(folder: Path, step: int, told: Callable[[str], None] = lambda word: None) -> None:
    """Save, then delete the oldest; tell when the save is done."""
    path = save(folder, step)
    told("saved")
    checkpoint.keep(folder, KEPT, trusted=path)


def is_complete(found: checkpoint.Checkpoint) -> bool:
    """Whether a checkpoint holds what `save` wrote, to the last bit."""
    step = found.step
    state = {f"m.{name}": tensor * 2 for name, tensor in tensors_of(step).items()}
    return (
        tensors_digest(found.weights.items()) == tensors_digest(tensors_of(step).items())
        and tensors_digest(found.state.items()) == tensors_digest(state.items())
        and found.facts == {"step": step, "losses": [1 / (step + i) for i in range(40)]}
    )


def wrongs_in(folder: Path, old: int, new: int, saved: bool) -> list[str]:
    """Return what is wrong with a run's folder after a save that was disturbed.

    Args:
        folder: the run's folder.
        old: newest step before, or 0.
        new: the step that was being written.
        saved: whether the save was acknowledged.
    """
    wrongs = []
    for path in checkpoint.steps_in(folder):
        try:
            if not is_complete(checkpoint.read(path)):
                wrongs.append(f"{path.name} loads wrong")
        except CheckpointError as error:
            wrongs.append(f"{path.name} is torn: {error}")
    try:
        found, skipped = checkpoint.load_newest(folder)
    except CheckpointError:
        return [*wrongs, "nothing loads"] if old or saved else wrongs
    if found.step != new and (saved or found.step != old):
        wrongs.append(f"the newest is {found.step}, not {new}{'' if saved else f' or {old}'}")
    return wrongs + [f"skipped {path.name}" for path, _ in skipped]


def leftovers(folder: Path) -> list[str]:
    """Return names that a save should not leave."""
    if not folder.exists():
        return []
    return [name for name in os.listdir(folder) if name != ".lock" and not name.startswith("step-")]


def folder_with(folder: Path, *steps: int) -> Path:
    """Make a run's folder that holds these steps."""
    for step in steps:
        save(folder, step)
    return folder


# Kills


@no_waiting()
def kill_campaign(place: Path, points: Counter | None = None) -> tuple[int, list[str]]:
    """Kill a child before and after each system call of a save; return how many were killed, and what was wrong.

    In two folders: a new one, and a full one, so that the oldest step and what an earlier kill left are deleted.
    """
    killed, wrongs = 0, []
    for scenario, old in (("new", 0), ("full", 3)):
        base = folder_with(place / f"base-{scenario}", 1, 2, 3) if old else None
        if base is not None:
            (base / f".step-00000009.1-{'0' * 16}.tmp").mkdir()
            (base / f".step-00000009.1-{'0' * 16}.tmp" / WEIGHTS).write_bytes(bytes(99))
        for index in range(1, 10_000):
            folder = place / f"{scenario}-{index}"
            if base is not None:
                shutil.copytree(base, folder)
            status, told = _play_in_child(lambda say, folder=folder, index=index: _die_at(folder, 4, index, say))
            wrongs += [f"{scenario}, point {index}: {w}" for w in wrongs_in(folder, old, 4, saved=b"saved" in told)]
            save_and_keep(folder, 5)
            wrongs += [f"{scenario}, point {index}: left {name}" for name in leftovers(folder)]
            shutil.rmtree(folder)
            if os.WIFEXITED(status):
                assert os.WEXITSTATUS(status) == 0, "the child failed by itself"
                break
            assert os.WTERMSIG(status) == signal.SIGKILL
            killed += 1
            if points is not None:
                points[told.split(b" ")[-1].decode()] += 1
    return killed, wrongs


def _die_at(folder: Path, step: int, index: int, say: Callable[[bytes], None]) -> None:
    point = 0
    really = os.write

    def hook(name, real, args, kwargs):
        nonlocal point
        for is_after in (False, True):
            point += 1
            if point == index:
                really(say.descriptor, f" {'after' if is_after else 'before'}-{name}".encode())
                os.kill(os.getpid(), signal.SIGKILL)
            if not is_after:
                value = real(*args, **kwargs)
        return value

    with intercepted(hook):
        save_and_keep(folder, step, lambda word: really(say.descriptor, word.encode()))


def _play_in_child(work: Callable) -> tuple[int, bytes]:
    """Fork, let the child work; return its status and what it said."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            say = lambda data: os.write(writer, data)  # noqa: E731
            say.descriptor = writer
            work(say)
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    told = b""
    while data := os.read(reader, 65536):
        told += data
    os.close(reader)
    return os.waitpid(child, 0)[1], told


# Failing disks


@no_waiting()
def failure_campaign(place: Path, codes: tuple[int, ...] = CODES) -> tuple[int, list[str]]:
    """Fail each system call of a save, once or from there on; return the number of cases, and what was wrong."""
    base, cases, wrongs = folder_with(place / "base", 1, 2, 3), 0, []
    for code in codes:
        for sticky in (False, True):
            for index in range(10_000):
                failing = Failing(index, code, sticky, REFUSED[code])
                found = _disturbed(base, place / "run", failing)
                if index >= len(failing.calls):
                    break
                cases += 1
                where = f"{errno.errorcode[code]}{' from' if sticky else ' at'} call {index}, {failing.calls[index]}"
                wrongs += [f"{where}: {wrong}" for wrong in found]
    return cases, wrongs


@no_waiting()
def short_campaign(place: Path) -> tuple[int, list[str]]:
    """Let each write take fewer bytes than it was given; alone, or with a full disk after it."""
    base, cases, wrongs = folder_with(place / "base", 1, 2, 3), 0, []
    for share, code in ((0.5, None), (0.01, None), (0.5, errno.ENOSPC), (0.0, None), (0.9, errno.EIO)):
        for index in range(10_000):
            short = Short(index, share, code)
            fine = share > 0 and code is None
            found = _disturbed(base, place / "run", short, must_work=fine)
            if index >= short.num_writes:
                break
            cases += 1
            wrongs += [f"write {index} took {share} of its bytes, then {code}: {wrong}" for wrong in found]
    return cases, wrongs


def _disturbed(base: Path, folder: Path, hook: Failing | Short, must_work: bool = False) -> list[str]:
    """Save into a copy of `base` through `hook`; return what is wrong then, or after the next save."""
    shutil.copytree(base, folder)
    saved, wrongs = [], []
    try:
        with intercepted(hook):
            save_and_keep(folder, 4, lambda word: saved.append(hook.failed))
    except CheckpointError as error:
        if must_work or not isinstance(error, StorageError):
            wrongs.append(f"the save failed with {error!r}")
    if saved and saved[0] in ("write", "fsync", "rename"):
        wrongs.append(f"{saved[0]} failed, and nobody noticed")
    wrongs += wrongs_in(folder, 3, 4, saved=bool(saved))
    try:
        save_and_keep(folder, 4)
        save_and_keep(folder, 5)
    except CheckpointError as error:
        wrongs.append(f"the next save failed: {error}")
    wrongs += wrongs_in(folder, 4, 5, saved=True) + [f"left {name}" for name in leftovers(folder)]
    shutil.rmtree(folder)
    return wrongs


@no_waiting()
def limit_campaign(place: Path) -> tuple[int, list[str]]:
    """Let the kernel itself cut files short: a limit on their size, in a child."""
    base, cases, wrongs = folder_with(place / "base", 1, 2, 3), 0, []
    largest = max((base / "step-00000003" / name).stat().st_size for name in FILES)
    for limit in range(0, largest, 397):
        folder = place / f"limit-{limit}"
        shutil.copytree(base, folder)
        status, told = _play_in_child(lambda say, folder=folder, limit=limit: _save_limited(folder, limit, say))
        cases += 1
        if os.waitstatus_to_exitcode(status) != 0 or told != b"EFBIG":
            wrongs.append(f"limit {limit}: ended with {status}, {told!r}")
        wrongs += [f"limit {limit}: {wrong}" for wrong in wrongs_in(folder, 3, 3, saved=False)]
        wrongs += [f"limit {limit}: left {name}" for name in leftovers(folder)]
        shutil.rmtree(folder)
    return cases, wrongs


def _save_limited(folder: Path, limit: int, say: Callable[[bytes], None]) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        save(folder, 4)
    except StorageError as error:
        say(b"EFBIG" if "(EFBIG)" in error.reason else error.reason.encode())


# Power cuts


@no_waiting()
def power_campaign(place: Path, draws: int = 6) -> tuple[int, list[str]]:
    """Cut the power after each system call of a save; return the number of cases, and what was wrong."""
    cases, wrongs, rng = 0, [], random.Random(0)
    for scenario, steps in (("full", (1, 2, 3)), ("empty", ())):
        folder = place / scenario
        folder.mkdir()
        folder_with(folder, *steps)
        recorder = Recorder(folder)
        with intercepted(recorder):
            save_and_keep(folder, 4, recorder.mark)
        for num_ops in range(len(recorder.ops) + 1):
            disk = Disk(recorder, num_ops)
            saved = any(op.kind == "mark" for op in recorder.ops[:num_ops])
            for luck in (0.0, 1.0, *(0.5 for _ in range(draws))):
                left = place / "left"
                left.mkdir()
                disk.lay_out(left, rng, luck)
                cases += 1
                found = wrongs_in(left, 3 if steps else 0, 4, saved)
                wrongs += [f"{scenario}, after {num_ops} operations, luck {luck}: {wrong}" for wrong in found]
                shutil.rmtree(left)
    return cases, wrongs


# Damage

Files = dict[tuple[int, str], bytes | None]
"""The files of all steps; None: missing."""


def _any(rng: random.Random, files: Files, step: int) -> tuple[int, str]:
    return rng.choice([key for key in files if key[0] == step and files[key]])


def flip_bit(files: Files, step: int, rng: random.Random) -> None:
    """Flip one bit."""
    key = _any(rng, files, step)
    content = bytearray(files[key])
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    files[key] = bytes(content)


def flip_bits(files: Files, step: int, rng: random.Random) -> None:
    """Flip up to 40 bits of one file."""
    key = _any(rng, files, step)
    content = bytearray(files[key])
    for _ in range(rng.randint(2, 40)):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    files[key] = bytes(content)


def _page(content: bytes, rng: random.Random) -> slice:
    size = rng.choice([64, 512, 4096])
    begin = rng.randrange(-(-len(content) // size)) * size
    return slice(begin, min(begin + size, len(content)))


def zero_page(files: Files, step: int, rng: random.Random) -> None:
    """Zero a page, as a disk does that lost it."""
    key = _any(rng, files, step)
    content, page = bytearray(files[key]), _page(files[key], rng)
    content[page] = bytes(page.stop - page.start)
    files[key] = bytes(content)


def garble_page(files: Files, step: int, rng: random.Random) -> None:
    """Fill a page with noise."""
    key = _any(rng, files, step)
    content, page = bytearray(files[key]), _page(files[key], rng)
    content[page] = rng.randbytes(page.stop - page.start)
    files[key] = bytes(content)


def stale_page(files: Files, step: int, rng: random.Random) -> None:
    """Put a page of the step before in the place of this one's, as a disk does that dropped a write."""
    key = _any(rng, files, step)
    older = files[max(1, step - 1), key[1]] or b""
    content, page = bytearray(files[key]), _page(files[key], rng)
    piece = older[page]
    content[page.start : page.start + len(piece)] = piece
    files[key] = bytes(content)


def truncate(files: Files, step: int, rng: random.Random) -> None:
    """Cut the end off."""
    key = _any(rng, files, step)
    files[key] = files[key][: rng.randrange(len(files[key]))]


def grow(files: Files, step: int, rng: random.Random) -> None:
    """Add to the end."""
    key = _any(rng, files, step)
    files[key] += rng.choice([b"\0", b"\n", b" ", rng.randbytes(rng.randint(1, 600))])


def shift(files: Files, step: int, rng: random.Random) -> None:
    """Drop bytes in the middle and pad the end: the size stays."""
    key = _any(rng, files, step)
    content, count = files[key], rng.choice([1, 8, 64])
    begin = rng.randrange(len(content))
    files[key] = (content[:begin] + content[begin + count :]).ljust(len(content), b"\0")


def swap_files(files: Files, step: int, rng: random.Random) -> None:
    """Swap two files of one step."""
    one, two = rng.sample(FILES, 2)
    files[step, one], files[step, two] = files[step, two], files[step, one]


def swap_steps(files: Files, step: int, rng: random.Random) -> None:
    """Swap a file between two steps."""
    other, name = rng.choice([s for s in (1, 2, 3) if s != step]), rng.choice(FILES)
    files[step, name], files[other, name] = files[other, name], files[step, name]


def mix(files: Files, step: int, rng: random.Random) -> None:
    """Put some, or all, files of another step in the place of this one's."""
    other = rng.choice([s for s in (1, 2, 3) if s != step])
    for name in rng.sample(FILES, rng.randint(1, len(FILES))):
        files[step, name] = files[other, name]


def swap_tensors(files: Files, step: int, rng: random.Random) -> None:
    """Swap the bytes of two tensors of one size inside a file."""
    name, prefix = rng.choice([(WEIGHTS, ""), (STATE, "m.")])
    content = files[step, name]
    if content is None or len(content) < 8:
        return
    header_size = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + header_size])
        (a, b), (c, d) = (header[f"{prefix}{n}.weight"]["data_offsets"] for n in ("first", "second"))
    except (ValueError, KeyError, TypeError):
        return  # another damage came before
    start, data = content[: 8 + header_size], content[8 + header_size :]
    files[step, name] = start + data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def lose(files: Files, step: int, rng: random.Random) -> None:
    """Delete a file."""
    files[step, rng.choice(FILES)] = None


DAMAGES = [
    flip_bit,
    flip_bits,
    zero_page,
    garble_page,
    stale_page,
    truncate,
    grow,
    shift,
    swap_files,
    swap_steps,
    mix,
    swap_tensors,
    lose,
]


class Tally:
    """What the damage campaign saw.

    Attributes:
        cases: by kind of damage.
        unchanged: cases by kind in which the damage happened to leave every byte as it was.
        found: damaged steps that were found.
        wrongs: what was wrong.
    """

    def __init__(self) -> None:
        self.cases: Counter[str] = Counter()
        self.unchanged: Counter[str] = Counter()
        self.found = 0
        self.wrongs: list[str] = []


@no_waiting()
def damage_campaign(place: Path, cases: int, seed: int = 0) -> Tally:
    """Damage the newest of three checkpoints, or the two newest, in `cases` ways, and read them."""
    folder, tally, rng = folder_with(place / "run", 1, 2, 3), Tally(), random.Random(seed)
    whole: Files = {(s, n): (_step(folder, s) / n).read_bytes() for s in (1, 2, 3) for n in FILES}
    for number in range(cases):
        damage = DAMAGES[number % len(DAMAGES)]
        files = dict(whole)
        damage(files, 3, rng)
        name = damage.__name__
        if rng.random() < 0.2:
            rng.choice(DAMAGES)(files, 2, rng)
        changed = [key for key in files if files[key] != whole[key]]
        _lay(folder, files, changed)
        bad = sorted({step for step, _ in changed}, reverse=True)
        tally.cases[name] += 1
        tally.unchanged[name] += not bad
        tally.wrongs += [f"case {number}, {name}: {wrong}" for wrong in _judged(folder, bad)]
        tally.found += len(bad)
        _lay(folder, whole, changed)
    return tally


def _judged(folder: Path, bad: list[int]) -> list[str]:
    """Return what is wrong with how a folder is read in which the steps `bad` (newest first) are damaged."""
    wrongs = []
    for step in bad:
        for read in (checkpoint.read, checkpoint.verify):
            try:
                read(_step(folder, step))
            except CheckpointError as error:
                if f"step-{step:08d}" not in str(error):
                    wrongs.append(f"the error does not name step {step}: {error}")
            else:
                wrongs.append(f"step {step} is damaged, and {read.__name__} does not see it")
    good = max({1, 2, 3} - set(bad), default=0)
    newer = [step for step in bad if step > good]
    try:
        found, skipped = checkpoint.load_newest(folder)
    except CheckpointError as error:
        if good or any(f"step-{step:08d}" not in str(error) for step in bad):
            wrongs.append(f"nothing loads: {error}")
        return wrongs
    if found.step != good or not is_complete(found):
        wrongs.append(f"step {found.step} was loaded, or not as it was; the newest good one is {good}")
    if [path.name for path, _ in skipped] != [f"step-{step:08d}" for step in newer]:
        wrongs.append(f"said to have skipped {skipped}, not {newer}")
    return wrongs


def _step(folder: Path, step: int) -> Path:
    return checkpoint.path_of(folder, step)


def _lay(folder: Path, files: Files, keys: list[tuple[int, str]]) -> None:
    for step, name in keys:
        path, content = _step(folder, step) / name, files[step, name]
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)


# By hand

PARTS = ("kills", "failures", "short", "limits", "power", "damage")


def main() -> int:
    """Run the campaigns that are asked for, and print what they saw as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=20_000, help="cases of damage")
    parser.add_argument("--seed", type=int, default=0, help="of the damage")
    parser.add_argument("--draws", type=int, default=6, help="random outcomes of each power cut")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps({"python": platform.python_version(), "torch": torch.__version__, "system": platform.platform()}))
    wrongs: list[str] = []
    for part in asked.parts:
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory() as name:
            place, more = Path(name), {}
            if part == "damage":
                tally = damage_campaign(place, asked.cases, asked.seed)
                cases, found = sum(tally.cases.values()), tally.wrongs
                more = {"by_kind": tally.cases, "left_unchanged": tally.unchanged, "damaged_steps_found": tally.found}
            elif part == "power":
                cases, found = power_campaign(place, asked.draws)
            elif part == "kills":
                points: Counter[str] = Counter()
                cases, found = kill_campaign(place, points)
                more = {"points": points}
            else:
                campaign = {"failures": failure_campaign, "short": short_campaign, "limits": limit_campaign}[part]
                cases, found = campaign(place)
        seconds = round(time.perf_counter() - begin, 1)
        print(json.dumps({"part": part, "cases": cases, "wrong": len(found), "seconds": seconds, **more}), flush=True)
        wrongs += [f"{part}: {wrong}" for wrong in found]
    for wrong in wrongs[:50]:
        print(wrong, file=sys.stderr)
    return 1 if wrongs else 0


if __name__ == "__main__":
    sys.exit(main())
