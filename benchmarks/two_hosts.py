"""Ways to agree between two hosts joined by a slow link, side by side.

    sudo python benchmarks/two_hosts.py
    sudo python benchmarks/two_hosts.py --rate 100mbit --rounds 5 --store docs/measured/two-hosts.md

The hosts are two network namespaces, joined by a virtual cable whose both ends are held to a rate by `tc tbf`. In each,
torchrun starts one worker; they meet over gloo. All train the model of examples/bytes.py for some steps, in turn. Bytes
are those that the first host's end of the cable sent, headers and acknowledgements included. Needs root, and the
programs `ip` and `tc`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from report import Table, machine, show, spread, store

import samestep
from samestep.codecs import Int8, PowerSGD

HERE = Path(__file__).resolve()
EXAMPLE = HERE.parents[1] / "examples" / "bytes.py"
NAMES = "samestep-a", "samestep-b"
ADDRESSES = "10.213.7.1", "10.213.7.2"
CABLE = "sstep-a", "sstep-b"
PORT = 29741

WAYS: dict[str, tuple[Any, int]] = {
    "Synchronous()": (samestep.Synchronous(), 6),
    "Synchronous(codec=Int8())": (samestep.Synchronous(codec=Int8()), 12),
    "Synchronous(codec=PowerSGD(4))": (samestep.Synchronous(codec=PowerSGD(rank=4)), 32),
    "Synchronous(codec=PowerSGD(16))": (samestep.Synchronous(codec=PowerSGD(rank=16)), 24),
    "Stale(bound=1)": (samestep.Stale(bound=1), 24),
    "Local(every=64, warm_up=1, codec=Int8())": (samestep.Local(every=64, warm_up=1, codec=Int8()), 128),
    "Local(every=64, warm_up=1, codec=Int8(), delay=8)": (
        samestep.Local(every=64, warm_up=1, codec=Int8(), delay=8),
        128,
    ),
    "Sites(every=64, codec=Int8(), back=Int8())": (None, 128),
}
"""What is compared, and in how many timed steps. Sites are runs of one replica each, which meet at the first host."""
MEETING = f"{ADDRESSES[0]}:{PORT + 1}"


def example() -> Any:
    """Return the module of the example."""
    spec = importlib.util.spec_from_file_location("example", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sent_bytes() -> int:
    """Return how many bytes have left this host by the cable."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return sum(int(line.split(":")[1].split()[8]) for line in lines if line.strip().startswith("sstep"))


def train(run: samestep.Run, name: str) -> dict[str, Any]:
    """Train under one of the ways; return seconds and bytes per step."""
    bytes_py, (way, num_steps) = example(), WAYS[name]
    train_set, _ = bytes_py.load_windows()
    batch_size = bytes_py.BATCH_SIZE
    if way is None:
        site, secret = os.environ["SITE"], os.environ["SECRET"]
        way = samestep.Sites(at=MEETING, name=site, every=64, codec=Int8(), back=Int8(), secret=secret)
        batch_size //= 2
    model = bytes_py.GPT()
    optimizer = torch_optimizer(model, bytes_py.LEARNING_RATE)
    run.replicate(model, optimizer, agree=way)

    def steps(count: int) -> None:
        for step in run.steps(train_set, batch_size, steps=count):
            for windows in step:
                loss, counts = bytes_py.losses(model, windows, bf16=False)
                step.backward(loss.sum() / counts.sum(), count=counts.sum().item())
            step.update(clip_norm=1.0)

    steps(1)
    begin, before = time.perf_counter(), sent_bytes()
    steps(num_steps)
    seconds, sent = time.perf_counter() - begin, sent_bytes() - before
    return {"seconds": seconds / num_steps, "bytes": sent / num_steps, "batch": bytes_py.BATCH_SIZE}


def torch_optimizer(model: Any, lr: float) -> Any:
    """Return the example's optimizer."""
    import torch

    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)


@contextlib.contextmanager
def hosts(rate: str) -> Iterator[None]:
    """Put up the two hosts; take them down again."""

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    made = []
    try:
        for name in NAMES:
            ip("netns", "add", name)
            made.append(name)
        ip("link", "add", CABLE[0], "type", "veth", "peer", "name", CABLE[1])
        for name, end, address in zip(NAMES, CABLE, ADDRESSES, strict=True):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "address", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
            limit = ["rate", rate, "burst", "32kbit", "latency", "400ms"]
            subprocess.run(["tc", "-n", name, "qdisc", "add", "dev", end, "root", "tbf", *limit], check=True)
        yield
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=False)


def play(way: str, limit: float) -> dict[str, Any]:
    """Train on both hosts; return what the first worker told."""
    if WAYS[way][0] is None:
        return play_sites(way, limit)
    started = []
    for number, (name, end) in enumerate(zip(NAMES, CABLE, strict=True)):
        command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
        command += ["--nproc-per-node", "1", "--node-rank", str(number), "--master-addr", ADDRESSES[0]]
        command += ["--master-port", str(PORT), str(HERE), "--worker", way]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": end, "OMP_NUM_THREADS": "1"}
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    try:
        told, _ = started[0].communicate(timeout=limit)
        started[1].wait(timeout=60)
    finally:
        for process in started:
            process.terminate()
            process.wait()
    lines = [line for line in told.splitlines() if line.startswith("{")]
    if not lines:
        raise SystemExit(f"{way} did not end well; its own words are above.")
    return json.loads(lines[-1])


def play_sites(way: str, limit: float) -> dict[str, Any]:
    """Train on both hosts, a run on each; return what that on the first told."""
    started = []
    with tempfile.TemporaryDirectory() as folder:
        secret = Path(folder) / "secret"
        secret.write_text("between these two hosts")
        inside = ["ip", "netns", "exec"]
        meet = [*inside, NAMES[0], sys.executable, "-m", "samestep", "meet", MEETING, "--secret", str(secret)]
        place = subprocess.Popen(meet, stdout=subprocess.PIPE, text=True)
        assert place.stdout is not None
        try:
            place.stdout.readline()
            for name in NAMES:
                environment = {**os.environ, "SITE": name, "SECRET": str(secret), "OMP_NUM_THREADS": "1"}
                command = [*inside, name, sys.executable, str(HERE), "--worker", way]
                started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
            told, _ = started[0].communicate(timeout=limit)
            started[1].wait(timeout=60)
        finally:
            for process in (place, *started):
                process.terminate()
                process.wait()
    return json.loads([line for line in told.splitlines() if line.startswith("{")][-1])


def worker(way: str) -> None:
    """Be a worker; the first prints what was measured."""
    if WAYS[way][0] is None:
        told = samestep.launch(lambda run: train(run, way), replicas=1, workers=1, seed=NAMES.index(os.environ["SITE"]))
    else:
        told = samestep.launch(lambda run: train(run, way), replicas=2, seed=0)
    if os.environ.get("RANK", "0") == "0":
        print("\n" + json.dumps(told), flush=True)


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description="Compare ways to agree between two hosts.")
    parser.add_argument("--rate", default="10mbit", help="of the link, as tc writes it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--store", help="file to write the result to")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker)
        return
    if os.geteuid() or not shutil.which("ip") or not shutil.which("tc"):
        raise SystemExit("Two hosts on one machine need root, and the programs ip and tc (iproute2).")
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in args.ways}
    with hosts(args.rate):
        for _ in range(args.rounds):
            for way in args.ways:
                found[way].append(play(way, limit=900))
                print(way, found[way][-1], flush=True)
    first = args.ways[0]
    rows = []
    for way, told in found.items():
        seconds = [one["seconds"] for one in told]
        faster = [a["seconds"] / b["seconds"] for a, b in zip(found[first], told, strict=True)]
        fewer = found[first][0]["bytes"] / told[0]["bytes"]
        speed = told[0]["batch"] / statistics.median(seconds)
        sent = f"{told[0]['bytes'] / 1e3:,.1f}"
        rows.append([f"`{way}`", f"{speed:.2f}", spread(faster), sent, f"{fewer:,.0f}"])
    heads = ["way to agree", "samples/s", "times as fast", "kB sent per step and host", "times fewer"]
    table = Table(f"Two hosts at {args.rate}, model of examples/bytes.py, batch of 16 windows, 2 replicas", heads, rows)
    where = machine()
    show([table], where)
    if args.store:
        store([table], where, Path(args.store))


if __name__ == "__main__":
    main()
