import contextlib
import io
import itertools
import os

import pytest

from samestep.measure.progress import Progress, line_of

ERASE = "\r\x1b[2K"


class Screen:
    """A stream, and the bytes of the script, in one order, as a terminal sees them."""

    def __init__(self, is_live, now=None):
        self.stream = io.StringIO()
        self.now = 0.0
        self.progress = Progress(
            "train.py",
            self.stream,
            is_live=is_live,
            clock=lambda: self.now,
            write_to=lambda _, data: self.stream.write(data.decode()),
        )

    @property
    def text(self):
        return self.stream.getvalue()


def test_a_line_tells_all_that_is_known():
    frame = {
        "step": 1200,
        "steps": 6000,
        "epoch": 3,
        "epochs": 12,
        "loss": 0.123456,
        "samples_per_second": 1234.4,
        "logged": {"accuracy": 0.98765},
    }
    assert line_of("train.py", frame) == (
        "train.py  step 1,200 of 6,000  epoch 3 of 12  loss 0.1235  1,234 samples/s  accuracy 0.9877"
    )


def test_what_is_not_known_is_left_out():
    assert line_of("train.py", {"step": 5, "steps": None, "epoch": None, "loss": None}) == "train.py  step 5"
    assert line_of("train.py", {}) == "train.py"


def test_the_bar_never_overflows():
    assert line_of("x", {"step": 30, "steps": 20}, with_bar=True).count("█") == 20
    assert line_of("x", {"step": 5, "steps": 20}, with_bar=True).count("█") == 5


def test_without_a_terminal_a_line_comes_every_ten_seconds():
    screen = Screen(is_live=False)
    for screen.now in (1.0, 9.9, 10.0, 10.1, 19.9, 20.0):
        screen.progress.update({"step": int(screen.now * 10)})
    assert screen.text == "train.py  step 100\ntrain.py  step 200\n"


@pytest.mark.parametrize("is_live", [True, False])
def test_a_line_that_cannot_be_written_is_no_error(is_live):
    now = itertools.count(step=20.0)
    with open("/dev/full", "w") as full:
        progress = Progress("train.py", full, is_live=is_live, clock=lambda: next(now), write_to=os.write)
        progress.update({"step": 1})
        progress.say("All is well.")
        progress.write(full.fileno(), b"printed")
        progress.close()
        with contextlib.suppress(OSError):
            full.close()


def test_prints_pass_above_the_line():
    screen = Screen(is_live=True)
    screen.progress.update({"step": 1})
    screen.progress.write(1, b"hello\n")
    assert screen.text == f"{ERASE}train.py  step 1{ERASE}hello\n{ERASE}train.py  step 1"


def test_an_unfinished_line_of_the_script_is_not_overwritten():
    screen = Screen(is_live=True)
    screen.progress.write(1, b"50 %")
    screen.progress.update({"step": 1})
    assert screen.text == "50 %"
    screen.progress.write(1, b"\n")
    assert screen.text == f"50 %\n{ERASE}train.py  step 1"


def test_closing_takes_the_line_away():
    screen = Screen(is_live=True)
    screen.progress.update({"step": 1})
    screen.progress.close()
    assert screen.text.endswith(ERASE)
    screen.progress.write(1, b"after\n")
    assert screen.text.endswith(f"{ERASE}after\n")


def test_the_time_left_follows_the_pace():
    screen = Screen(is_live=True)
    screen.progress.update({"step": 10, "steps": 110})
    assert "left" not in screen.text
    screen.now = 20.0
    screen.progress.update({"step": 20, "steps": 110})
    assert "3 min 0 s left" in screen.text


def test_a_sentence_stays():
    screen = Screen(is_live=True)
    screen.progress.update({"step": 1})
    screen.progress.say("Resumed.")
    assert screen.text == f"{ERASE}train.py  step 1{ERASE}Resumed.\n{ERASE}train.py  step 1"
