"""Words for sizes, times and counts."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from samestep.units import bytes_in_words, count_in_words, seconds_in_words


@pytest.mark.parametrize(
    ("num_bytes", "words"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (25 * 2**20, "25.0 MiB"),
        (2**20 - 1, "1.0 MiB"),
        (3 * 2**30, "3.0 GiB"),
        (2**60, "1,024.0 PiB"),
        (-2048, "-2.0 KiB"),
    ],
)
def test_bytes(num_bytes, words):
    assert bytes_in_words(num_bytes) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (12.5e-6, "12.5 us"),
        (0.0032, "3.2 ms"),
        (0.99999, "1.0 s"),
        (12.34, "12.3 s"),
        (59.99, "1 min 0 s"),
        (72, "1 min 12 s"),
        (3599.7, "1 h 0 min"),
        (7500, "2 h 5 min"),
        (86_399, "1 d 0 h"),
        (3 * 86_400 + 4 * 3600, "3 d 4 h"),
        (-72, "-1 min 12 s"),
        (math.inf, "inf s"),
    ],
)
def test_seconds(seconds, words):
    assert seconds_in_words(seconds) == words


def test_counts():
    assert [count_in_words(n) for n in (0, 999, 1437, 1_281_167)] == ["0", "999", "1,437", "1,281,167"]


@given(st.floats(min_value=60, max_value=86_400 * 400))
def test_smaller_part_never_overflows(seconds):
    parts = seconds_in_words(seconds).replace(",", "").split()
    limit = {"s": 60, "min": 60, "h": 24}[parts[3]]
    assert int(parts[2]) < limit


@given(st.integers(min_value=0, max_value=2**49))
def test_bytes_never_show_1024_of_a_unit(num_bytes):
    number, unit = bytes_in_words(num_bytes).replace(",", "").split()
    assert float(number) < 1024
    assert unit in ("B", "KiB", "MiB", "GiB", "TiB")
