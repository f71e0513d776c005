"""What secure aggregation costs one client, in one thread: elements per second of encoding and of each mask.

python benchmarks/masking.py --elements 1000000 --clients 300
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from samestep.federated.fixed_point import FixedPoint
from samestep.federated.masking import Masking
from samestep.federated.neighbours import degree_of


def fastest(work: Callable[[], object], num_rounds: int = 7) -> float:
    """Return the least CPU seconds of `work`: what the machine's other users do does not count."""
    seconds = []
    for _ in range(num_rounds):
        begin = time.process_time()
        work()
        seconds.append(time.process_time() - begin)
    return min(seconds)


def main() -> None:
    """Print one line per word size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--elements", type=int, default=1_000_000)
    parser.add_argument("--clients", type=int, default=300)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    values = torch.randn(asked.elements, generator=torch.Generator().manual_seed(0))
    for modulus_bits in (32, 64):
        numbers = FixedPoint(limit=1.0, modulus_bits=modulus_bits)
        round_ = Masking(numbers=numbers).bind(range(asked.clients), 0, 0)
        words = numbers.encode(values, (0,))
        # Agrees on keys, outside of what is timed.
        round_.mask(0, words)
        num_masks = degree_of(asked.clients) + 1
        encoded = asked.elements / fastest(lambda n=numbers: n.encode(values, (0,))) / 1e6
        masked = asked.elements / fastest(lambda r=round_, w=words: r.mask(0, w)) / 1e6
        print(
            f"{modulus_bits} bits: encode {encoded:.0f} million elements/s, mask {masked:.1f} with {num_masks} masks, "
            f"{masked * num_masks:.0f} per mask"
        )


if __name__ == "__main__":
    main()
