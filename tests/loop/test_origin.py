"""Which lines of code changed, in words."""

from __future__ import annotations

from samestep.loop.origin import changed_lines, digests_of


def lines(*entries):
    return b"".join(text.encode().ljust(4, b".") + number.to_bytes(4, "little") for text, number in entries)


def test_numbers_do_not_count():
    assert digests_of(lines(("a", 1), ("b", 2))) == digests_of(lines(("a", 3), ("b", 9)))


def test_changed_lines():
    there = lines(("a", 1), ("b", 2), ("c", 3), ("d", 7))
    here = lines(("a", 1), ("x", 5), ("c", 6), ("d", 7), ("e", 8))
    assert changed_lines(there, here) == (
        "4 lines of code, only there line 2",
        "5 lines of code, only here lines 5, 8",
    )
    assert changed_lines(there, there[:-8]) == ("4 lines of code, only there line 7", "3 lines of code")


def test_many_changed_lines_are_counted():
    there, here = lines(("a", 1), ("b", 2)), lines(*((f"x{i}", i) for i in range(1, 10)))
    assert changed_lines(there, here)[1] == "9 lines of code, only here lines 1, 2, 3, 4, 5 and 4 more"


def test_a_function_without_a_file_is_one_digest():
    assert changed_lines(lines(("a", 0)), lines(("b", 0))) == ("612e2e2e", "622e2e2e")
