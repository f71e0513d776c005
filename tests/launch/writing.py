"""Gives a writer one order and prints its answer, and whether anything is left. Its argument says what the writer does.

There is no torch in it, so it has one thread.
"""

import json
import os
import selectors
import signal
import sys
import threading
import time

from samestep.launching.writer import Writer

ACTS = {
    "writes": lambda order: {"step": order["step"], "trouble": None},
    "long": lambda order: {"message": "x" * 60_000, "reason": "long"},
    "raises": lambda order: 1 / 0,
    "dies": lambda order: os.kill(os.getpid(), signal.SIGKILL),
    "leaves": lambda order: os._exit(3),
    "hangs": lambda order: time.sleep(60),
    "is slow": lambda order: [time.sleep(0.1) or os.write(2, b".") for _ in range(40)] and {"step": 1, "trouble": None},
    "is told to end": lambda order: os.kill(os.getpid(), signal.SIGTERM) or {"step": 1, "trouble": None},
    "thread": lambda order: {},
}


def main(name):
    released = []
    writer = Writer(
        ACTS[name], lambda: released.append(writer.pid), lambda: None, silence=2.0 if name == "is slow" else 0.5
    )
    before = os.listdir("/proc/self/fd")
    if name == "thread":
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    # A worker may have died after it had lent a snapshot, and before it could order anything.
    writer.begin()
    assert released == [0]
    released.clear()
    answers = []
    for step in (1, 2):
        writer.write({"step": step, "folder": "kept"})
        selector = selectors.DefaultSelector()
        selector.register(writer, selectors.EVENT_READ)
        while len(released) < step:
            selector.select(0.05)
            writer.serve()
            writer.look(time.monotonic())
        selector.close()
        answers.append(writer.answer())
        assert writer.answer() is None, "told once"
    same = os.listdir("/proc/self/fd") == before
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        print(json.dumps({"answers": answers, "same_descriptors": same, "children": file.read()}), flush=True)
    os._exit(0)


main(sys.argv[1])
