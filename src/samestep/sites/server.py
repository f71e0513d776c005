"""The meeting place, over HTTP. Six questions, each a POST of a packed frame:

    /          nothing; who asks it learns the server's life (`epoch`)
    /join      a site takes part: settings and shapes; the first brings its weights
    /give      a contribution
    /outcome   what became of one; held back for some seconds where that is not known yet
    /newest    the newest weights
    /leave     a site has come to its end

Every question carries a proof (`proof`) in its headers, which is looked at before its content is read, and holds once:
it is made for this server's life (`epoch`), and with a nonce that was not used in it. Frames are as long as they must
be at most, and hold no code.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from samestep.errors import CheckpointError, MismatchError, NonFiniteError, SettingsError, UsageError
from samestep.sites import proof
from samestep.sites.outer_state import Content
from samestep.sites.place import Place
from samestep.sites.table import Answer, Gift
from samestep.storage import wire

HOLD_SECONDS = 1.0
"""A question is held back for so long; then it is asked again. A Ctrl-C at the site is heard as late as that."""
_MOST_CONNECTIONS = 256
_MOST_OF_ONE = 64
_MOST_NONCES = 1 << 16
"""Seen ones that are remembered; then another life begins, which wants other proofs."""
_HEAD_SECONDS = 5.0
"""For all that comes before the content; strangers may take a connection for so long."""
_BODY_SECONDS = 30.0
_MOST_ITEMS = float(1 << 53)
_MOST_NAME = 100
_FIRST_BYTES = 1 << 34
"""The longest message before it is known how large the model is."""
_STATUS: dict[type[Exception], int] = {MismatchError: 409, NonFiniteError: 422, UsageError: 410, CheckpointError: 500}


class Server(ThreadingHTTPServer):
    """Answers for one `Place` until it is shut down."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, host: str, port: int, place: Place, secret: bytes):
        """Listen.

        Args:
            host: of this machine; where others reach it, there must be a secret.
            port: 0 for any that is free; see `server_address`.
            place: what it answers for.
            secret: see `proof.read_secret`.

        Raises:
            SettingsError: the address cannot be used.
        """
        self.place = place
        self.secret = secret
        self.epoch = secrets.token_hex(8)
        self._lock = threading.Lock()
        self._nonces: set[str] = set()
        self._connections: Counter[str] = Counter()
        self._strangers: dict[socket.socket, float] = {}
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise SettingsError(f"Nobody can listen at {host}:{port}: {error}. Name another address.") from error

    def is_new(self, nonce: str) -> bool:
        """Return whether a nonce comes for the first time; from now on it does not."""
        with self._lock:
            is_new = nonce not in self._nonces
            self._nonces.add(nonce)
            if len(self._nonces) > _MOST_NONCES:
                # None may be forgotten while its proof holds.
                self._nonces.clear()
                self.epoch = secrets.token_hex(8)
            return is_new

    def process_request(self, request: Any, client_address: Any) -> None:
        host = client_address[0]
        with self._lock:
            has_room = self._connections.total() < _MOST_CONNECTIONS and self._connections[host] < _MOST_OF_ONE
            if has_room:
                self._connections[host] += 1
                self._strangers[request] = time.monotonic()
        if not has_room:
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:
            # There is no thread for it.
            self._forget(request, host)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._forget(request, client_address[0])

    def service_actions(self) -> None:
        """Hang up on who has not proven anything in time, as who sends a byte now and then. Called now and then."""
        with self._lock:
            for request, since in self._strangers.items():
                if time.monotonic() - since > _HEAD_SECONDS:
                    with contextlib.suppress(OSError):
                        request.shutdown(socket.SHUT_RDWR)

    def believe(self, request: socket.socket) -> None:
        """Let who has proven that it knows the secret take its time."""
        with self._lock:
            self._strangers.pop(request, None)

    def _forget(self, request: socket.socket, host: str) -> None:
        with self._lock:
            self._strangers.pop(request, None)
            self._connections[host] -= 1
            self._connections += Counter()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a connection broke, and its site asks again."""


class _Handler(BaseHTTPRequestHandler):
    """One question."""

    server: Server
    timeout = _HEAD_SECONDS
    server_version = "samestep"
    sys_version = ""

    def do_POST(self) -> None:
        server, secret, nonce = self.server, self.server.secret, self.headers.get("Samestep-Nonce", "")
        claimed = self.headers.get("Samestep-Digest", "")
        told = self.headers.get("Samestep-Proof", "")
        parts = [part.encode("utf-8", "replace") for part in (server.epoch, self.path, nonce, claimed)]
        if not proof.holds(told, secret, *parts) or not server.is_new(nonce):
            self.send_response(403)
            self.send_header("Samestep-Epoch", server.epoch)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        server.believe(self.connection)
        self.connection.settimeout(_BODY_SECONDS)
        length = self.headers.get("Content-Length", "")
        largest = server.place.largest() or _FIRST_BYTES
        if not length.isascii() or not length.isdigit() or int(length) > largest:
            self.send_error(413, "Too long")
            return
        body = self.rfile.read(int(length))
        if len(body) != int(length) or proof.digest(body).hex() != claimed:
            self.send_error(400, "The content is not what was announced")
            return
        status, reply = self._answered(body)
        self.send_response(status)
        self.send_header("Content-Length", str(len(reply)))
        shown = proof.sign(secret, b"reply", nonce.encode(), b"%d" % status, proof.digest(reply))
        self.send_header("Samestep-Proof", shown)
        self.end_headers()
        for start in range(0, len(reply), proof.PIECE):
            self.wfile.write(reply[start : start + proof.PIECE])

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the place tells what matters."""

    def _answered(self, body: bytes) -> tuple[int, bytes]:
        """Return status and content of the answer."""
        try:
            if self.path == "/":
                return 200, wire.pack({})
            frame = wire.unpack(body)
            match self.path:
                case "/join":
                    site, life, start = _name(frame["site"]), _name(frame["life"]), frame["start"]
                    known = _whole(frame["round"], -1), _whole(frame["sequence"], 0)
                    told = self.server.place.join(site, life, frame["terms"], start, known)
                    return (202, wire.pack({})) if told is None else (200, wire.pack(told))
                case "/give":
                    answer = self.server.place.give(_content(frame))
                    return 202 if answer is Answer.LATER else 200, wire.pack({"answer": answer.value})
                case "/outcome":
                    site, sequence, base = _name(frame["site"]), _whole(frame["sequence"]), _whole(frame["base"], 0)
                    try:
                        found = self.server.place.outcome(site, sequence, base, HOLD_SECONDS)
                    except KeyError:
                        return 404, wire.pack({"error": f"Site {site!r} has not given {sequence}."})
                    if found is None:
                        return 202, wire.pack({"missing": self.server.place.missing()})
                    return 200, wire.pack(found)
                case "/newest":
                    return 200, wire.pack(self.server.place.newest())
                case "/leave":
                    self.server.place.leave(_name(frame["site"]), _name(frame["life"]))
                    return 200, wire.pack({})
            return 404, wire.pack({"error": "There is no such question."})
        except (MismatchError, NonFiniteError, UsageError, CheckpointError) as error:
            return _STATUS[_kind(error)], wire.pack({"error": str(error)})
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            return 400, wire.pack({"error": f"This is no question of samestep's: {error}"})


def _kind(error: Exception) -> type[Exception]:
    return next(kind for kind in _STATUS if isinstance(error, kind))


def _name(value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= _MOST_NAME or not value.isprintable():
        raise ValueError("a site has a name")
    return value


def _whole(value: Any, least: int = 1) -> int:
    if type(value) is not int or value < least:
        raise ValueError(f"a whole number of at least {least} is due, not {value!r}")
    return value


def _content(frame: Any) -> Content:
    """Return the contribution that a frame holds.

    Raises:
        ValueError, TypeError, KeyError: it holds none.
    """
    payload, buffers, items = frame["payload"], frame["buffers"], frame["items"]
    if not isinstance(payload, torch.Tensor) or not isinstance(buffers, torch.Tensor):
        raise ValueError("tensors are due")
    if type(items) is not float or not 0 < items <= _MOST_ITEMS:
        raise ValueError("a contribution is that of some samples")
    training = _name(frame["training"])
    step, base, sequence = _whole(frame["step"], 0), _whole(frame["base"], 0), _whole(frame["sequence"])
    gift = Gift(_name(frame["site"]), sequence, _whole(frame["first"], 0), base, items, _name(frame["life"]))
    return Content(gift, step, training, payload, buffers)
