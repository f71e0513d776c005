"""A site's way to the meeting place. What fails on the way is tried again; asking twice is as asking once."""

from __future__ import annotations

import array
import contextlib
import fcntl
import http.client
import secrets
import select
import socket
import termios
import time
from collections.abc import Callable, Iterator
from typing import Any

from samestep.errors import MismatchError, NonFiniteError, PeerError, SettingsError
from samestep.sites import proof
from samestep.storage import wire

_CONNECT_SECONDS = 5.0
_PIECE_SECONDS = 30.0
"""For a piece on its way, and for an answer to begin."""
_LOOK_MILLISECONDS = 50
_PAUSES = (0.1, 0.2, 0.5, 1.0, 2.0)
_ERRORS = {409: MismatchError, 422: NonFiniteError}


class Unreachable(Exception):
    """The meeting place did not answer for some time."""


class Unproven(Exception):
    """Somebody answered who does not know the secret, or the answer was changed on its way, or is not the place's."""


class Visitor:
    """Asks the meeting place."""

    def __init__(self, host: str, port: int, secret: bytes, stops: Callable[[], bool] = lambda: False):
        """Name the place; nothing is sent yet.

        Args:
            host, port: where it is.
            secret: see `proof.read_secret`.
            stops: whether to give up waiting.
        """
        self._host = host
        self._port = port
        self._secret = secret
        self._stops = stops
        self._has_met = False
        self._epoch = ""

    def ask(self, path: str, frame: Any, seconds: float) -> tuple[int, Any]:
        """Return status and content of the answer.

        Args:
            path: the question.
            frame: plain values and tensors.
            seconds: for which it is tried again where nobody answers.

        Raises:
            Unreachable: nobody answered.
            MismatchError: whoever answered never knew the secret; or the place says so.
            NonFiniteError: the place says so.
            PeerError: it does not take the question.
        """
        until, pauses, body = time.monotonic() + seconds, iter(_PAUSES), wire.pack(frame)
        while True:
            try:
                status, content = self._once(path, body, max(1.0, until - time.monotonic()))
                self._has_met = True
                break
            except (OSError, http.client.HTTPException, UnicodeError, Unproven) as error:
                if isinstance(error, Unproven) and not self._has_met:
                    raise MismatchError(str(error)) from error
                pause = next(pauses, _PAUSES[-1])
                if self._stops() or time.monotonic() + pause > until:
                    raise Unreachable(f"{self._host}:{self._port} does not answer: {error}") from error
                time.sleep(pause)
        if status in _ERRORS:
            raise _ERRORS[status](content["error"])
        if status not in (200, 202, 404, 410):
            raise PeerError(f"The meeting place at {self._host}:{self._port} refused {path} ({status}): {content}")
        return status, content

    def _once(self, path: str, body: bytes, seconds: float) -> tuple[int, Any]:
        """Ask once; see `ask`. Nobody is waited for longer than `seconds` where nothing comes."""
        if len(body) > proof.PIECE:
            # A long question that is refused before it is read breaks off before the refusal is heard.
            self._in_epoch("/", b"", seconds)
        nonce, reply, content = self._in_epoch(path, body, seconds)
        parts = (b"reply", nonce.encode(), b"%d" % reply.status, proof.digest(content))
        if not proof.holds(reply.getheader("Samestep-Proof", ""), self._secret, *parts):
            if reply.status >= 500:
                raise OSError(f"status {reply.status}")
            raise Unproven(
                f"What answers at {self._host}:{self._port} (status {reply.status}) does not know the secret, or is no "
                f"meeting place. Give `samestep meet` and all sites the same file."
            )
        return reply.status, wire.unpack(content)

    def _in_epoch(self, path: str, body: bytes, seconds: float) -> tuple[str, http.client.HTTPResponse, bytes]:
        """Return the nonce of a question, and what came; ask again where the place is in another life than believed."""
        nonce = secrets.token_hex(16)
        reply, content = self._exchange(path, body, nonce, seconds)
        epoch = reply.getheader("Samestep-Epoch", "")
        if reply.status == 403 and epoch not in ("", self._epoch):
            # Each life of the place wants proofs of its own.
            self._epoch = epoch
            nonce = secrets.token_hex(16)
            reply, content = self._exchange(path, body, nonce, seconds)
        return nonce, reply, content

    def _exchange(self, path: str, body: bytes, nonce: str, seconds: float) -> tuple[http.client.HTTPResponse, bytes]:
        digest = proof.digest(body).hex()
        parts = (self._epoch.encode(), path.encode(), nonce.encode(), digest.encode())
        headers = {
            "Content-Length": str(len(body)),
            "Samestep-Nonce": nonce,
            "Samestep-Digest": digest,
            "Samestep-Proof": proof.sign(self._secret, *parts),
        }
        connection = http.client.HTTPConnection(self._host, self._port, timeout=min(_CONNECT_SECONDS, seconds))
        try:
            connection.connect()
            limit = min(_PIECE_SECONDS, max(seconds, _CONNECT_SECONDS))
            connection.sock.settimeout(limit)
            connection.request("POST", path, self._pieces(body), headers)
            self._await_answer(connection.sock, limit)
            reply = connection.getresponse()
            content = bytearray()
            while piece := reply.read(proof.PIECE):
                self._check()
                content += piece
            if reply.length:
                raise OSError(f"its answer broke off, {reply.length} bytes before the end")
        finally:
            connection.close()
        return reply, bytes(content)

    def _pieces(self, body: bytes) -> Iterator[bytes]:
        for start in range(0, len(body), proof.PIECE):
            self._check()
            yield body[start : start + proof.PIECE]

    def _await_answer(self, connected: socket.socket, seconds: float) -> None:
        """Wait for some seconds, and while what the system holds of the question moves: a slow link needs minutes."""
        left, since = _unsent(connected), time.monotonic()
        # Not `select`, which takes no descriptor above 1023.
        answer = select.poll()
        answer.register(connected, select.POLLIN)
        while not answer.poll(_LOOK_MILLISECONDS):
            self._check()
            now = _unsent(connected)
            if now < left:
                since = time.monotonic()
            elif time.monotonic() - since > seconds:
                raise TimeoutError("no answer comes")
            left = now

    def _check(self) -> None:
        """Break off where the run is to end."""
        if self._stops():
            raise OSError("the run is to end")


def _unsent(connected: socket.socket) -> int:
    """Return the bytes that the system still holds of what was sent; 0 where it does not tell."""
    held = array.array("i", [0])
    with contextlib.suppress(OSError):
        fcntl.ioctl(connected, termios.TIOCOUTQ, held)
    return held[0]


def address_of(at: str, least_port: int = 1) -> tuple[str, int]:
    """Return host and port of "host:port".

    Args:
        at: the address.
        least_port: 0 where the system may choose one.

    Raises:
        SettingsError: it is something else.
    """
    host, _, port = at.rpartition(":") if isinstance(at, str) else ("", "", "")
    if not host or not port.isascii() or not port.isdigit() or not least_port <= int(port) < 65536:
        raise SettingsError(f"You named {at!r} as the meeting place; it has the form host:port, as 10.0.0.1:7077.")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise SettingsError(f"You named {at!r} as the meeting place; put an IPv6 address in brackets: [::1]:7077.")
    return host.removeprefix("[").removesuffix("]"), int(port)
