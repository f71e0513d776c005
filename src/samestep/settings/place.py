"""What `samestep meet` does: be a meeting place for `samestep.Sites`. torch is imported when it is called."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable


def keep_place(at: str, secret: str | None, folder: str | None, tell: Callable[[str], None] = print) -> int:
    """Be the meeting place until SIGINT or SIGTERM; return the exit code.

    Args:
        at: "host:port" of this machine; port 0 for any that is free.
        secret: file with the secret that the sites know too; not needed where only this machine can reach it.
        folder: where what is agreed on is kept, so that a place started again goes on.
        tell: is given a line of text now and then.

    Raises:
        SettingsError: the address or the secret cannot be used.
        CheckpointError: the folder holds states, and none of them can be read.
    """
    from samestep.sites.place import Place
    from samestep.sites.proof import read_secret
    from samestep.sites.server import Server
    from samestep.sites.visitor import address_of

    host, port = address_of(at, least_port=0)
    known = read_secret(secret, host)
    server = Server(host, port, Place(folder, tell), known)
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: ended.set())
    thread = threading.Thread(target=server.serve_forever, name="samestep meet", daemon=True)
    thread.start()
    shown = f"[{host}]" if ":" in host else host
    tell(f"Sites meet at {shown}:{server.server_address[1]}. Ctrl-C ends it.")
    # In pieces: a signal is handled between them.
    while not ended.wait(0.5):
        pass
    server.shutdown()
    server.server_close()
    return 0
