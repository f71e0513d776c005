"""Bytes and speed of every codec, on one thread: a large float32 matrix, and a small one.

python benchmarks/codecs.py
python benchmarks/codecs.py --rounds 15 --store docs/measured/codecs.md
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from report import Table, machine, show, spread, store

from samestep.codecs import (
    BFloat16,
    Codec,
    Exact,
    Feedback,
    Float16,
    Int4,
    Int8,
    PowerSGD,
    RandomK,
    Sign,
    TopK,
)

LARGE, SMALL = (2000, 2000), (64, 64)
LINK = 100e6 / 8
"""Bytes per second of a slow link: 100 Mbit/s."""

CODECS: list[Codec] = [
    Exact(),
    BFloat16(),
    Float16(),
    Int8(),
    Int8(stochastic=False),
    Int4(),
    Sign(),
    Sign(block=1024),
    TopK(0.01),
    RandomK(0.01),
    PowerSGD(4),
    Feedback(Int8()),
    Feedback(TopK(0.01)),
    Feedback(PowerSGD(4)),
]


def seconds_of(work: Callable[[], object], num_rounds: int, num_calls: int = 1) -> list[float]:
    """Return the thread's own seconds per call, for each round but a first one."""
    found = []
    for _ in range(num_rounds + 1):
        begin = time.thread_time()
        for _ in range(num_calls):
            work()
        found.append((time.thread_time() - begin) / num_calls)
    return found[1:]


def measure(codec: Codec, shape: tuple[int, int], num_rounds: int, num_calls: int) -> tuple[list[float], list[float]]:
    """Return seconds to encode, and to decode, a normal float32 matrix."""
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    state = codec.fresh(shape)
    payload = codec.encode(tensor, (0,), state)
    encode = seconds_of(lambda: codec.encode(tensor, (0,), state), num_rounds, num_calls)
    return encode, seconds_of(lambda: codec.decode(payload, shape), num_rounds, num_calls)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--store", metavar="FILE.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    where = machine()
    columns = ["codec", "bytes per element", "smaller by", "encode, MB/s", "decode, MB/s", "both, % of time saved"]
    large = Table("2,000 x 2,000 elements (16 MB)", columns)
    small = Table("64 x 64 elements (16 KiB)", ["codec", "bytes", "encode, us", "decode, us"])
    num_raw = 4 * LARGE[0] * LARGE[1]
    for codec in CODECS:
        name, stated = f"`{codec!r}`".replace("warm_up=0", "").replace(", )", ")"), codec.num_bytes(LARGE)
        encode, decode = measure(codec, LARGE, args.rounds, 1)
        saved = (num_raw - stated) / LINK
        both = statistics.median(encode) + statistics.median(decode)
        speeds = [spread([num_raw / seconds / 1e6 for seconds in way], "{:,.0f}") for way in (encode, decode)]
        share = f"{both / saved:.1%}" if saved else ""
        large.rows.append([name, f"{4 * stated / num_raw:.3f}", f"{num_raw / stated:.1f}", *speeds, share])
        encode, decode = measure(codec, SMALL, args.rounds, 50)
        times = [spread([seconds * 1e6 for seconds in way], "{:.0f}") for way in (encode, decode)]
        small.rows.append([name, f"{codec.num_bytes(SMALL):,}", *times])
    large.notes += [
        "MB of float32 per second of the thread's own time: what others take of the core does not count.",
        "Time saved: the bytes that are not sent, on a link of 100 Mbit/s.",
    ]
    tables = [large, small]
    show(tables, where)
    if args.store:
        store(tables, where, Path(args.store))


if __name__ == "__main__":
    main()
