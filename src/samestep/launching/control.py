"""The door of a run: a private socket through which its user's commands come in (`samestep ps`, `scale`, `stop`).

One request and one answer per connection. Who connects is not trusted: it must be the same user, has a few seconds for
one short frame, and there is room for few. Nothing here blocks.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from samestep.core.worker import Wish
from samestep.errors import SettingsError, WorkerError
from samestep.launching import request, runs
from samestep.launching.channel import Frame
from samestep.launching.orders import Orders

MOST_GUESTS = 16
MOST_WORKERS = 1024
"""What a run may be scaled to."""
SECONDS_TO_ASK = 5.0
"""A guest who has not said all by then has to go when the next one comes."""
_CREDENTIALS = struct.Struct("3i")

Check = Callable[[dict[str, Any], Any], None]
"""(settings of the run, number of workers): raises SettingsError where they clash."""


@dataclass
class _Guest:
    connection: socket.socket
    said: bytes = b""
    since: float = field(default_factory=time.monotonic)
    waits_for: str = ""


class Control:
    """Listens for one run.

    Attributes:
        name: of the run, for commands.
        target: the number of workers that was ordered, None if none was.
    """

    def __init__(self, title: str, orders: Orders, check: Check):
        """Open the door.

        Args:
            title: of what runs.
            orders: where orders to the workers go.
            check: see `Check`.

        Raises:
            OSError: there is no place for the socket.
        """
        self.name = runs.name_of(title)
        self.target: int | None = None
        self._orders = orders
        self._check = check
        self._begun = time.monotonic()
        self._seat: dict[str, Any] = {}
        self._progress: dict[str, Any] = {}
        self._stop_asked = False
        self._guests: dict[int, _Guest] = {}
        self._listener = runs.bind(self.name)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)

    def fileno(self) -> int:
        """Return a descriptor that is readable when there is something to serve."""
        return self._selector.fileno()

    def serve(self, signals: list[int]) -> None:
        """Let in who has come, and hear what was said. A stop is appended to `signals`."""
        for key, _ in self._selector.select(0):
            guest = self._guests.get(key.fd)
            if guest is None:
                self._let_in()
            elif self._hear_out(guest):
                self._answer(guest, signals)

    def hear(self, frame: Frame) -> None:
        """Take what the first worker says of the run."""
        if frame.kind == "progress":
            self._progress = frame.info
        elif frame.kind == "seated":
            self._seat = frame.info
            if self.target is None:
                self._tell("scale", {"workers": frame.info["num_workers"]})

    def scaled(self) -> bool:
        """Take note that the workers left because of an order to scale; return whether there was one."""
        if self.target is None:
            return False
        self.target = None
        self._orders.done()
        return True

    def abandon(self) -> None:
        """In a forked worker: give up what belongs to the supervisor."""
        for guest in self._guests.values():
            guest.connection.close()
        self._listener.close()
        self._selector.close()

    def close(self, message: str) -> None:
        """Remove the door; who waits is told how the run ended."""
        self._tell("stop", {"message": message})
        self._tell("scale", {"error": f"The run ended before it was scaled. {message}".rstrip()})
        for guest in list(self._guests.values()):
            self._see_off(guest)
        self.abandon()
        runs.remove(self.name)

    @property
    def _is_stopping(self) -> bool:
        return self._stop_asked or bool(self._orders.pending() & Wish.STOP)

    def _let_in(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError:
            # No descriptor is left. To look again at once would only burn time, so the door stays shut.
            self._selector.unregister(self._listener)
            return
        connection.setblocking(False)
        _, uid, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        if uid != os.getuid():
            connection.close()
            return
        now = time.monotonic()
        for late in [g for g in self._guests.values() if not g.waits_for and now > g.since + SECONDS_TO_ASK]:
            self._see_off(late)
        guest = _Guest(connection)
        self._guests[connection.fileno()] = guest
        self._selector.register(connection, selectors.EVENT_READ)
        if len(self._guests) > MOST_GUESTS:
            self._say(guest, {"error": f"{MOST_GUESTS} commands are asking this run already. Try again in a moment."})

    def _hear_out(self, guest: _Guest) -> bool:
        """Read what a guest says; return whether there is more. Who is gone, or goes on talking, is seen off."""
        try:
            data = guest.connection.recv(request.FRAME_BYTES + 1 - len(guest.said))
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data or guest.waits_for:
            self._see_off(guest)
            return False
        guest.said += data
        return True

    def _answer(self, guest: _Guest, signals: list[int]) -> None:
        try:
            asked = request.unpacked(guest.said)
            if asked is None:
                return
            if asked.get("ask") == "status":
                self._say(guest, self._status())
            elif asked.get("ask") == "stop":
                guest.waits_for = "stop"
                if not self._is_stopping:
                    self._stop_asked = True
                    signals.append(signal.SIGTERM)
            elif asked.get("ask") == "scale":
                self._scale(guest, asked.get("workers"))
            else:
                raise WorkerError("This run does not know what was asked. Use the samestep that started it.")
        except SettingsError as error:
            self._say(guest, {"error": str(error), "refused": True})
        except WorkerError as error:
            self._say(guest, {"error": str(error)})

    def _scale(self, guest: _Guest, num_workers: Any) -> None:
        if not self._seat:
            raise WorkerError("The run is still starting: its script has not come to launch() yet. Try again then.")
        if not self._seat.get("can_scale"):
            raise WorkerError("The run is in a later launch() of its script; only the first one can be scaled.")
        if self._is_stopping:
            raise WorkerError("The run is being stopped.")
        if not isinstance(num_workers, int) or num_workers > MOST_WORKERS:
            raise SettingsError(f"You set workers={num_workers!r}. Use a whole number, at most {MOST_WORKERS}.")
        self._check(self._seat.get("options", {}), num_workers)
        if num_workers == self._seat["num_workers"] and self.target is None:
            self._say(guest, {"workers": num_workers})
            return
        guest.waits_for = "scale"
        self.target = num_workers
        self._orders.give(Wish.SCALE)

    def _status(self) -> dict[str, Any]:
        shown = ("step", "steps", "epoch", "samples_per_second")
        return {
            "pid": os.getpid(),
            "seconds": time.monotonic() - self._begun,
            "workers": self._seat.get("num_workers"),
            **{name: self._progress.get(name) for name in shown},
        }

    def _tell(self, waiting_for: str, answer: dict[str, Any]) -> None:
        for guest in [g for g in self._guests.values() if g.waits_for == waiting_for]:
            self._say(guest, answer)

    def _say(self, guest: _Guest, answer: dict[str, Any]) -> None:
        """Give the one answer, and close. Who does not take it, which a socket's room allows at once, gets none."""
        text = answer.get("error") or answer.get("message")
        if text:
            key = "error" if "error" in answer else "message"
            answer = {**answer, key: text[: request.MOST_BYTES // 8]}
        with contextlib.suppress(OSError):
            guest.connection.send(request.packed(answer))
        self._see_off(guest)

    def _see_off(self, guest: _Guest) -> None:
        self._selector.unregister(guest.connection)
        del self._guests[guest.connection.fileno()]
        guest.connection.close()
