"""Ctrl-C and its kin: the step is finished, a checkpoint written, everything is gone, and the run can go on."""

import os
import signal
import time
from pathlib import Path

import pytest

from samestep.guarding.stack import state_of


def ended_within(run, seconds):
    begin = time.monotonic()
    code, err = run.end()
    took = time.monotonic() - begin
    assert took < seconds, err
    return code, err.splitlines()


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGHUP, marks=pytest.mark.long)])
def test_a_signal_keeps_the_step_and_the_run_goes_on_to_the_same_bits(steered, shell, undisturbed, number):
    run = steered("--workers", 2, "--checkpoint", "kept")
    run.read_until("step 5")
    run.process.send_signal(number)
    code, lines = ended_within(run, 5)
    assert code == 128 + number
    (last,) = [int(line.split()[1]) for line in run.lines[-1:]]
    assert last < 12, "it finished its step, no more"
    assert lines == [
        "samestep: The run ends after this step. Once more (Ctrl-C) ends it at once.",
        f"samestep: {number.name} ended the run. What is kept is the checkpoint after step {last + 1}: "
        "go on with --resume kept.",
    ]
    assert [path.name for path in (shell.folder / "kept").glob("step-*")] == [f"step-{last + 1:08}"]

    if number == signal.SIGHUP:
        return
    on = steered("--workers", 3, "--checkpoint", "kept", "--resume", "kept", seconds=0.0)
    code, err = on.end()
    assert code == 0, err
    assert on.result == undisturbed


def test_without_a_folder_nothing_is_kept_and_that_is_said(steered):
    run = steered("--workers", 2)
    run.read_until("step 5")
    run.process.send_signal(signal.SIGINT)
    code, lines = ended_within(run, 5)
    assert code == 130
    assert lines[-1] == (
        "samestep: SIGINT ended the run. Nothing is kept, because no checkpoint folder was set (--checkpoint DIR)."
    )
    assert "swallowed by except Exception" not in run.lines


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.long), signal.SIGTERM])
def test_a_script_by_itself_is_stopped_in_the_same_way(steered, number):
    run = steered(by=(), after=("checkpoint=kept",))
    run.read_until("step 5")
    run.process.send_signal(number)
    code, lines = ended_within(run, 5)
    assert code == 128 + number
    assert "What is kept is the checkpoint after step" in lines[-1]


@pytest.mark.parametrize(
    ("mode", "line", "kept"),
    [
        ("shard", "in a shard", "Nothing is kept: no checkpoint had been written to kept yet."),
        ("builds", "building", "Nothing is kept: no checkpoint had been written to kept yet."),
        ("mean", "in run.mean", "What is kept is the checkpoint after step 60: go on with --resume kept."),
    ],
)
def test_where_no_step_ends_in_time_the_newest_checkpoint_stays(steered, mode, line, kept):
    run = steered("--workers", 2, "--checkpoint", "kept", mode=mode, seconds=0.0)
    run.read_until(line)
    run.process.send_signal(signal.SIGINT)
    code, lines = ended_within(run, 5)
    assert code == 130
    assert lines[-1] == f"samestep: SIGINT ended the run. {kept}"


@pytest.mark.parametrize("by", [("-m", "samestep", "run"), pytest.param((), marks=pytest.mark.long)])
def test_the_second_ctrl_c_ends_it_at_once(steered, by):
    run = steered(mode="shard", seconds=0.0, by=by)
    run.read_until("in a shard")
    run.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    run.process.send_signal(signal.SIGINT)
    code, lines = ended_within(run, 10)
    assert code == 130
    assert "Nothing is kept" in lines[-1]


@pytest.mark.parametrize("by", [("-m", "samestep", "run"), ()])
def test_where_nobody_reads_any_more_the_step_is_kept_all_the_same(steered, shell, by):
    """The terminal is closed, or Ctrl-C ended `tee`, too."""
    settings = ("--workers", 2, "--checkpoint", "kept") if by else ()
    run = steered(*settings, by=by, after=() if by else ("checkpoint=kept",))
    run.read_until("step 5")
    run.process.stdout.close()
    run.process.stderr.close()
    time.sleep(0.3)  # lets it print a few lines
    run.process.send_signal(signal.SIGHUP)
    code = run.process.wait(60)
    assert code == 128 + signal.SIGHUP
    assert len(list((shell.folder / "kept").glob("step-*"))) == 1


def test_a_signal_that_comes_twice_at_once_counts_once(steered):
    run = steered("--workers", 2, "--checkpoint", "kept")
    run.read_until("step 5")
    for _ in range(3):
        run.process.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    code, lines = ended_within(run, 5)
    assert code == 143
    assert "What is kept is the checkpoint after step" in lines[-1]


def test_a_signal_to_every_process_of_the_run_is_as_good(steered, shell):
    run = steered("--workers", 2, "--checkpoint", "kept")
    run.read_until("step 5")
    for pid in shell.processes():
        os.kill(pid, signal.SIGTERM)
    code, lines = ended_within(run, 5)
    assert code == 143
    assert "What is kept is the checkpoint after step" in lines[-1]


def test_ctrl_z_suspends_all_of_a_run_and_costs_nothing(steered, shell, undisturbed):
    run = steered(by=(), seconds=0.01)
    run.read_until("step 5")
    run.process.send_signal(signal.SIGTSTP)
    deadline = time.monotonic() + 30
    alive = shell.processes()
    while {state_of(pid) for pid in alive} != {"T"}:
        assert time.monotonic() < deadline
        time.sleep(0.01)
        alive = shell.processes()
    assert len(alive) > 1, "it went on to its end"
    time.sleep(1.5)  # longer than a worker may be stopped alone
    run.process.send_signal(signal.SIGCONT)
    code, err = run.end()
    assert code == 0, err
    assert "hung" not in err
    assert run.result == undisturbed


def test_a_script_that_swallows_everything_is_stopped_all_the_same(steered):
    run = steered("--workers", 2, "--checkpoint", "kept", mode="swallows")
    run.read_until("step 5")
    run.process.send_signal(signal.SIGINT)
    code, lines = ended_within(run, 5)
    assert code == 130
    assert "swallowed" in run.lines
    assert "after the steps" not in run.lines
    assert "What is kept is the checkpoint after step" in lines[-1]


def test_an_interrupt_while_everything_is_imported_shows_no_traceback(steered):
    run = steered()
    maps, deadline = Path(f"/proc/{run.process.pid}/maps"), time.monotonic() + 60
    while "libtorch" not in maps.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    run.process.send_signal(signal.SIGINT)
    code, lines = ended_within(run, 5)
    assert code == 130
    assert len(lines) == 1 and lines[0].startswith("samestep: SIGINT ended")
