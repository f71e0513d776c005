"""Frames over a socket between two processes of one run: a kind, plain facts as JSON, and opaque bytes."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

_HEADER = struct.Struct("<IQ")
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Frame:
    """One message.

    Attributes:
        kind: what it is about, "progress".
        info: plain facts.
        blob: bytes that neither end of the channel looks into.
    """

    kind: str
    info: dict[str, Any] = field(default_factory=dict)
    blob: bytes = b""


class Sender:
    """The writing end."""

    def __init__(self, connection: socket.socket):
        self._connection = connection

    def send(self, kind: str, info: dict[str, Any] | None = None, blob: bytes = b"") -> None:
        """Send one frame; blocks until the other end took it.

        Values of `info` that JSON cannot carry become numbers where they hold one, else text.

        Raises:
            OSError: the other end is gone.
        """
        text = json.dumps([kind, info if info is not None else {}], default=_plain).encode()
        self._connection.sendall(_HEADER.pack(len(text), len(blob)) + text)
        if blob:
            self._connection.sendall(blob)

    def fileno(self) -> int:
        """Return the descriptor, so that a forked child can close what is not its own."""
        return self._connection.fileno()

    def close(self) -> None:
        """Close this end."""
        self._connection.close()


class Receiver:
    """The reading end; never blocks."""

    def __init__(self, connection: socket.socket):
        connection.setblocking(False)
        self._connection = connection
        self._buffer = bytearray()
        self.at_end = False

    def frames(self) -> Iterator[Frame]:
        """Read what has arrived and yield the complete frames. Sets `at_end` once the other end has closed."""
        self._read()
        while len(self._buffer) >= _HEADER.size:
            text_size, blob_size = _HEADER.unpack_from(self._buffer)
            blob_at = _HEADER.size + text_size
            if len(self._buffer) < blob_at + blob_size:
                return
            kind, info = json.loads(self._buffer[_HEADER.size : blob_at])
            blob = bytes(memoryview(self._buffer)[blob_at : blob_at + blob_size])
            del self._buffer[: blob_at + blob_size]
            yield Frame(kind, info, blob)

    def _read(self) -> None:
        while True:
            try:
                data = self._connection.recv(_CHUNK)
            except BlockingIOError:
                return
            except ConnectionError:
                data = b""
            if not data:
                self.at_end = True
                return
            self._buffer += data

    def fileno(self) -> int:
        """Return the descriptor, for selectors."""
        return self._connection.fileno()

    def close(self) -> None:
        """Close this end."""
        self._connection.close()


def channel() -> tuple[Sender, Receiver]:
    """Return the two ends of a new channel."""
    near, far = socket.socketpair()
    return Sender(far), Receiver(near)


class ChannelReporter:
    """Gives what a run reports to the supervisor. But for `ready`, only the first worker of a run uses it."""

    def __init__(
        self, sender: Sender, caught_up: Callable[[], None], take_over: Callable[[], None], silent: bool = False
    ):
        """Report to the other end of `sender`.

        Args:
            sender: the way to the supervisor.
            caught_up: called in this process when it has caught up.
            take_over: called in this process when it becomes the first worker.
            silent: keep sentences back until it has caught up: the others have told them.
        """
        self._sender = sender
        self._caught_up = caught_up
        self.take_over = take_over
        self._is_silent = silent

    def progress(self, frame: dict[str, Any]) -> None:
        """Tell where the run stands: step, steps, epoch, epochs, loss, samples_per_second, logged."""
        self._sender.send("progress", frame)

    def caught_up(self) -> None:
        """Take note that this worker is where the run is."""
        self._is_silent = False
        self._caught_up()

    def note(self, text: str) -> None:
        """Pass on a sentence for the user."""
        if not self._is_silent:
            self._sender.send("note", {"text": text})

    def ready(self) -> None:
        """Tell that this worker has caught up as far as it can alone."""
        self._sender.send("ready")

    def mended(self, info: dict[str, Any]) -> None:
        """Tell that the members go on without some: first, members, dead, step."""
        self._sender.send("mended", info)

    def joined(self, info: dict[str, Any]) -> None:
        """Tell that others have come in: members, step."""
        self._sender.send("joined", info)

    def trace(self, frame: dict[str, Any]) -> None:
        """Pass on one committed step for `samestep verify`: step, loss, tensors (name to digest)."""
        self._sender.send("trace", frame)


def _plain(value: Any) -> Any:
    item = getattr(value, "item", None)
    if callable(item):
        try:
            return item()
        except (RuntimeError, ValueError, TypeError):
            pass
    return str(value)
