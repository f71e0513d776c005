"""A disk that forgets: what may be left of a folder if the power goes after any system call of a save.

The rules are those that POSIX gives, and no file system is worse: bytes of a file are sure after its fsync, names in a
folder after the folder's. What is not sure yet may be there or not, each change for itself, in any combination; bytes
may be missing or zero. A rename is there or not, never half.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = None


class Op(NamedTuple):
    """One change, or one fsync.

    Attributes:
        kind: "names" (changes of one folder), "bytes" (appended to a file), "sync" or "mark".
        node: number of the folder or file.
        value: names: {name: node or None for gone}; bytes: the bytes; mark: a word.
    """

    kind: str
    node: int
    value: Any = None


class Recorder:
    """A hook for `intercepted` that writes down what a save does to one folder.

    Attributes:
        ops: what was done.
        nodes: of each folder and file, its bytes at the beginning, or FOLDER.
        names: of each folder, the nodes in it at the beginning.
    """

    def __init__(self, root: Path):
        self.ops: list[Op] = []
        self.nodes: list[bytes | None] = []
        self.names: dict[int, dict[str, int]] = {}
        self._node_of: dict[int, int] = {}  # by inode
        self._descriptors: dict[int, int] = {}
        self._take(root)

    def mark(self, word: str) -> None:
        """Note that the save has come to a point."""
        self.ops.append(Op("mark", 0, word))

    def __call__(self, name: str, real: Callable, args: tuple, kwargs: dict) -> Any:
        """Play one call."""
        return getattr(self, f"_{name}", self._other)(real, *args, **kwargs)

    def _other(self, real: Callable, *args: Any, **kwargs: Any) -> Any:
        return real(*args, **kwargs)

    def _open(self, real: Callable, path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        existed = os.path.lexists(path)
        descriptor = real(path, flags, *args, **kwargs)
        inode = os.fstat(descriptor).st_ino
        if flags & os.O_CREAT and not existed:
            node = self._new(inode, b"")
            self.ops.append(Op("names", self._parent(path), {os.path.basename(path): node}))
        self._descriptors[descriptor] = self._node_of[inode]
        return descriptor

    def _write(self, real: Callable, descriptor: int, data: Any) -> int:
        count = real(descriptor, data)
        self.ops.append(Op("bytes", self._descriptors[descriptor], bytes(data)[:count]))
        return count

    def _fsync(self, real: Callable, descriptor: int) -> None:
        real(descriptor)
        self.ops.append(Op("sync", self._descriptors[descriptor]))

    def _mkdir(self, real: Callable, path: Any, *args: Any) -> None:
        real(path, *args)
        node = self._new(os.stat(path).st_ino, FOLDER)
        self.names[node] = {}
        self.ops.append(Op("names", self._parent(path), {os.path.basename(path): node}))

    def _rename(self, real: Callable, source: Any, target: Any) -> None:
        node = self._node_of[os.stat(source).st_ino]
        assert os.path.dirname(source) == os.path.dirname(target)
        real(source, target)
        changes = {os.path.basename(source): None, os.path.basename(target): node}
        self.ops.append(Op("names", self._parent(source), changes))

    def _unlink(self, real: Callable, name: Any, *, dir_fd: int | None = None) -> None:
        real(name, dir_fd=dir_fd)
        self._gone(name, dir_fd)

    def _rmdir(self, real: Callable, name: Any, *, dir_fd: int | None = None) -> None:
        real(name, dir_fd=dir_fd)
        self._gone(name, dir_fd)

    def _gone(self, name: Any, dir_fd: int | None) -> None:
        parent = self._parent(name) if dir_fd is None else self._node_of[os.fstat(dir_fd).st_ino]
        self.ops.append(Op("names", parent, {os.path.basename(name): None}))

    def _parent(self, path: Any) -> int:
        return self._node_of[os.stat(os.path.dirname(path)).st_ino]

    def _new(self, inode: int, content: bytes | None) -> int:
        self._node_of[inode] = len(self.nodes)
        self.nodes.append(content)
        return len(self.nodes) - 1

    def _take(self, path: Path) -> int:
        node = self._new(path.stat().st_ino, FOLDER if path.is_dir() else path.read_bytes())
        if path.is_dir():
            self.names[node] = {entry.name: self._take(entry) for entry in path.iterdir()}
        return node


class Disk:
    """What is sure, and what is not, after some operations."""

    def __init__(self, recorder: Recorder, num_ops: int):
        self._sure_bytes = {node: content for node, content in enumerate(recorder.nodes) if content is not FOLDER}
        self._bytes = dict(self._sure_bytes)
        self._sure_names = {node: dict(names) for node, names in recorder.names.items()}
        self._pending: dict[int, list[dict[str, int | None]]] = {node: [] for node in recorder.names}
        for op in recorder.ops[:num_ops]:
            self._play(op)

    def lay_out(self, folder: Path, rng: random.Random, luck: float) -> None:
        """Write into an empty folder what the disk may hold after the power went.

        Args:
            folder: the place.
            rng: decides what is left.
            luck: how likely a change that is not sure is there, 0 to 1.
        """
        self._lay_out_folder(0, folder, rng, luck)

    def _play(self, op: Op) -> None:
        if op.kind == "names":
            self._pending[op.node].append(op.value)
        elif op.kind == "bytes":
            self._bytes[op.node] += op.value
        elif op.kind == "sync" and op.node in self._pending:
            for change in self._pending[op.node]:
                _change(self._sure_names[op.node], change)
            self._pending[op.node].clear()
        elif op.kind == "sync":
            self._sure_bytes[op.node] = self._bytes[op.node]

    def _lay_out_folder(self, node: int, folder: Path, rng: random.Random, luck: float) -> None:
        names = dict(self._sure_names[node])
        for change in self._pending[node]:
            if rng.random() < luck:
                _change(names, change)
        for name, inner in names.items():
            if inner in self._pending:
                (folder / name).mkdir()
                self._lay_out_folder(inner, folder / name, rng, luck)
            else:
                (folder / name).write_bytes(self._content(inner, rng, luck))

    def _content(self, node: int, rng: random.Random, luck: float) -> bytes:
        sure, now = self._sure_bytes[node], self._bytes[node]
        if rng.random() < luck:
            return now
        kept = rng.randint(len(sure), len(now))
        return now[:kept] + bytes(len(now) - kept) * (rng.random() < 0.5)


def _change(names: dict[str, int], change: dict[str, int | None]) -> None:
    for name, node in change.items():
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node
