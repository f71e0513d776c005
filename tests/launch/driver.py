"""Supervises a fleet whose workers do something simple, and prints how it ended. Run by the `drive` fixture.

There is no torch in it, so it starts at once.
"""

import json
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

from samestep.errors import PeerError, SettingsError, UsageError
from samestep.launching.orders import Orders
from samestep.launching.supervisor import Fleet, supervise


def ordinary(context):
    sys.stdout.write(f"worker {context.rank} prints\n")
    assert context.shared.num_workers == context.num_forked
    context.sender.send("progress", {"rank": context.rank, "forked": context.num_forked, "pid": os.getpid()})
    if context.rank == 0:
        context.sender.send("finished", {"facts": {}}, b"x" * 3_000_000)


def one_raises(context):
    sys.stdout.write(f"worker {context.rank} prints\n")
    if context.rank == 1:
        raise ValueError("the second worker's error")
    time.sleep(60)


def all_raise(context):
    raise ValueError("everyone's error")


def peer_first(context):
    if context.rank == 0:
        raise PeerError("worker 1 is gone")
    time.sleep(0.3)
    raise ValueError("the cause")


def only_peers(context):
    if context.rank == 0:
        raise PeerError("worker 1 does not answer")
    time.sleep(60)


def wrong_settings(context):
    raise SettingsError("These settings clash.")


def wrong_use(context):
    context.is_playing = True
    raise SettingsError("These settings clash in the middle.")


def killed(context):
    if context.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def crashed(context):
    if context.rank == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(60)


def os_exit(context):
    if context.rank == 1:
        os._exit(7)
    time.sleep(60)


def exit_code(context):
    sys.exit(3)


def exit_message(context):
    sys.exit("good bye")


def exit_all(context):
    context.is_playing = True
    sys.exit()


def exit_one(context):
    context.is_playing = True
    if context.rank == 1:
        sys.exit(0)
    time.sleep(60)


def stubborn(context):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if context.rank == 0:
        raise ValueError("the first error")
    time.sleep(60)


def tidies_up(context):
    ready = Path(os.environ["TMPDIR"]) / "ready"
    if context.rank == 1:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(ready.with_name("tidied").touch()))
        ready.touch()
        time.sleep(60)
    while not ready.exists():
        time.sleep(0.001)
    raise ValueError("the first error")


def wants_three(context):
    if context.num_forked == 3:
        context.sender.send("progress", {"rank": context.rank, "forked": 3})
        return
    if context.rank == 0:
        context.sender.send("wants", {"num_workers": 3})
    context.leave()


def leaves(context):
    if context.rank > 0:
        context.leave()
    context.sender.send("progress", {"rank": 0, "forked": context.num_forked})


def abandons_child(context):
    child = subprocess.Popen(["sleep", "60"])
    context.sender.send("progress", {"pid": child.pid})


def abandons_child_and_fails(context):
    abandons_child(context)
    raise UsageError("It failed.")


def sleeps(context):
    context.sender.send("progress", {"pid": os.getpid()})
    time.sleep(60)


def traced(context):
    for step in range(1000):
        context.sender.send("trace", {"step": step})
        time.sleep(0.001)


def never(context):
    raise AssertionError("a worker was forked")


def survived(context, then="joins"):
    """Worker 1 dies; the other goes on, and takes in who comes in its place."""
    if context.rank == 1 and not context.joins:
        while not context.snapshots.num_calls:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGKILL)
    if context.joins:
        if then == "fails":
            raise ValueError("a replacement's own error")
        context.sender.send("ready", {"slot": context.rank, "generation": context.generation})
        while not context.shared.is_over[0]:
            time.sleep(0.001)
        return
    context.sender.send("seated", {"num_workers": context.num_forked, "can_scale": True})
    context.snapshots.num_calls += 1
    while not context.shared.dead[1]:
        time.sleep(0.001)
    context.sender.send("mended", {"first": 0, "members": [0], "dead": [1], "step": 1})
    if then == "joins":
        while context.orders.joiners() != (1,):
            time.sleep(0.001)
        context.sender.send("joined", {"members": [0, 1], "step": 2})
        while context.orders.joiners():
            time.sleep(0.001)
        context.shared.is_over[0] = 1
    while then == "fails" and not Path(os.environ["TMPDIR"], "given-up").exists():
        time.sleep(0.001)
    context.sender.send("finished", {"pending": int(context.orders.pending())})


def survived_alone(context):
    survived(context, then="fails")


def survived_and_finished_first(context):
    survived(context, then="waits")


class Calls:
    """Counts calls in memory that workers share, as `Snapshots` does."""

    def __init__(self):
        self._words = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("q")

    @property
    def num_calls(self):
        return self._words[0]

    @num_calls.setter
    def num_calls(self, count):
        self._words[0] = count


class Shared:
    """Something of the supervisor's that workers inherit."""

    def __init__(self, num_workers):
        self.num_workers = num_workers
        self.dead = memoryview(mmap.mmap(-1, mmap.PAGESIZE))
        self.is_over = memoryview(mmap.mmap(-1, mmap.PAGESIZE))
        self._descriptor = os.memfd_create("samestep-test")

    def wrote_protected(self, rank):
        return False

    def mark_dead(self, rank):
        self.dead[rank] = 1

    def close(self):
        os.close(self._descriptor)


class Recorder:
    """Keeps what it is told; pids are shown at once, for tests that interfere."""

    def __init__(self, num_traces):
        self.frames = []
        self._num_traces = num_traces

    def frame(self, frame):
        self.frames.append([frame.kind, frame.info, len(frame.blob)])
        if frame.kind == "note" and "None of" in frame.info["text"]:
            Path(os.environ["TMPDIR"], "given-up").touch()
        if "pid" in frame.info:
            print("pid", frame.info["pid"], flush=True)
        return sum(kind == "trace" for kind, _, _ in self.frames) >= self._num_traces

    def output(self, stream, data):
        raise AssertionError("output was not to be read")


def main():
    body, num_workers = globals()[sys.argv[1]], int(sys.argv[2])
    if body is never:
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    recorder = Recorder(num_traces=5)
    before = sorted(os.listdir("/proc/self/fd"))
    try:
        fleet = Fleet(body=body, share=Shared)
        if body.__name__.startswith("survived"):
            orders, calls = Orders(), Calls()
            context = {"orders": orders, "snapshots": calls}
            fleet = replace(fleet, context=context, orders=orders, snapshots=calls, survivors_go_on=True)
        outcome = supervise(fleet, num_workers, recorder)
    except SettingsError as error:
        print(json.dumps({"settings_error": str(error)}))
        return
    print(
        json.dumps(
            {
                "code": outcome.code,
                "message": outcome.message,
                "num_workers": outcome.num_workers,
                "frames": recorder.frames,
                "same_descriptors": before == sorted(os.listdir("/proc/self/fd")),
                "children": Path(f"/proc/self/task/{os.getpid()}/children").read_text(),
            }
        )
    )


if __name__ == "__main__":
    main()
