import sysconfig
from pathlib import Path

import pytest

import samestep
from samestep.guarding.crash import Crash

OURS = Path(samestep.__file__).parent / "loop" / "run.py"
TORCH = "/somewhere/lib/python3/site-packages/torch/nn/init.py"
STANDARD = Path(sysconfig.get_path("stdlib")) / "ctypes" / "__init__.py"
TRAIN = "/home/me/a (b), line 3 in c/train.py"


def dump(*frames, others=""):
    lines = "".join(f'  File "{file}", line {number} in {name}\n' for file, number, name in frames)
    current = f"Current thread 0x00007f (most recent call first):\n{lines}\n"
    return f"Fatal Python error: Segmentation fault\n\n{others}{current}"


HERE, LAUNCHED, TOP = (TRAIN, 14, "main"), (OURS, 8, "play"), (TRAIN, 40, "<module>")


def test_the_users_frames_of_the_crashed_thread_are_found():
    other = f'Thread 0x01 (most recent call first):\n  File "{TRAIN}", line 99 in reader\n\n'
    crash = Crash(dump=dump((STANDARD, 1, "f"), (TORCH, 2, "ones_"), HERE, LAUNCHED, TOP, others=other))
    assert crash.where == "train.py:14"
    assert [(f.filename, f.lineno, f.name) for f in crash.users_frames] == [
        (TRAIN, 40, "<module>"),
        (TRAIN, 14, "main"),
    ]


def test_the_last_dump_counts():
    child = dump((TRAIN, 77, "read"))
    assert Crash(dump=child + dump(HERE, TOP)).where == "train.py:14"


@pytest.mark.parametrize("text", ["", "Fatal Python error: Aborted\n", dump(), dump(LAUNCHED), "garbage\n" * 3])
def test_without_a_users_frame_there_is_no_line(text):
    crash = Crash(dump=text, wrote_protected=None)
    assert (crash.where, crash.users_frames, crash.wrote_probably) == ("", [], False)


@pytest.mark.parametrize(
    ("frames", "wrote", "probably"),
    [
        ([HERE, TOP], None, True),
        ([(TORCH, 2, "ones_"), HERE, TOP], None, True),
        ([LAUNCHED, HERE, TOP], None, False),
        ([(TORCH, 2, "backward"), LAUNCHED, HERE, TOP], None, False),
        ([HERE, TOP], False, False),
        ([HERE, TOP], True, False),
    ],
)
def test_a_write_is_probable_only_where_nothing_is_known_and_users_code_was_under_way(frames, wrote, probably):
    assert Crash(dump=dump(*frames), wrote_protected=wrote).wrote_probably is probably
