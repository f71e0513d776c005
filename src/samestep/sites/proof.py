"""A shared secret: what crosses between a site and the meeting place proves that its sender knows it.

Nothing is hidden from who listens, and nothing that was changed or made up on the way is believed; an answer belongs to
its question alone. Where the content matters, send it through a tunnel.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from pathlib import Path

from samestep.errors import SettingsError

PIECE = 1 << 16
"""Bytes. Timeouts hold for so much of a message, so that a link may be as slow as it is."""
_LEAST_BYTES = 16


def read_secret(path: str | None, host: str) -> bytes:
    """Return the secret in a file; an empty one without a file, which will do on this machine alone.

    Raises:
        SettingsError: it cannot be read, is too short, or is needed and was not given.
    """
    if path is None:
        if is_local(host):
            return b""
        raise SettingsError(
            f"You named {host!r} without a secret, so that anybody who reaches it could change what all sites learn. "
            f"Write at least {_LEAST_BYTES} random bytes into a file of the same content on every site "
            f"(head -c 32 /dev/urandom | base64), and give its path."
        )
    try:
        secret = Path(path).read_bytes().strip()
    except OSError as error:
        raise SettingsError(f"You named {path!r} as the file of the secret; it cannot be read: {error}.") from error
    if len(secret) < _LEAST_BYTES:
        raise SettingsError(f"The secret in {path!r} has {len(secret)} bytes; use at least {_LEAST_BYTES}.")
    return secret


def is_local(host: str) -> bool:
    """Return whether only this machine can reach a host of that name."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def sign(secret: bytes, *parts: bytes) -> str:
    """Return the proof of some parts, in hexadecimal digits."""
    hashed = hmac.new(secret, b"samestep sites 1", hashlib.sha256)
    for part in parts:
        hashed.update(len(part).to_bytes(8, "little") + part)
    return hashed.hexdigest()


def holds(proof: str, secret: bytes, *parts: bytes) -> bool:
    """Return whether a proof is that of these parts."""
    return hmac.compare_digest(proof.encode("utf-8", "replace"), sign(secret, *parts).encode())


def digest(content: bytes) -> bytes:
    """Return the digest of a message."""
    return hashlib.sha256(content).digest()
