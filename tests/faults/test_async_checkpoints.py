"""Kills and stops of the writer, of workers and of the supervisor while checkpoints are written beside training."""

import os
import random
import re
import signal
import time
from pathlib import Path

import pytest

from samestep.storage import checkpoint

ASYNC = ("--workers", 2, "--checkpoint", "kept", "--async-checkpoints")


def wait_for(condition, run, seconds=60):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it never came"
        assert run.process.poll() is None, run.end()
    return found


def writers(shell):
    """Return the pids of live writers."""
    found = []
    for pid in shell.processes():
        try:
            if Path(f"/proc/{pid}/comm").read_text().strip() == "samestep-writer":
                found.append(pid)
        except OSError:
            continue
    return found


def workers_of(run):
    """Return the pids of the children of the supervisor, the oldest first."""
    children = Path(f"/proc/{run.process.pid}/task/{run.process.pid}/children").read_text().split()
    return [int(pid) for pid in children]


def state_of(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def steps_of(shell):
    return [int(path.name.rpartition("-")[2]) for path in checkpoint.steps_in(shell.folder / "kept")]


def stopped_writer(run, shell):
    """Stop a writer before it has published anything more; return its pid."""
    while True:
        (pid,) = wait_for(lambda: writers(shell), run)[:1]
        try:
            os.kill(pid, signal.SIGSTOP)
            wait_for(lambda pid=pid: state_of(pid) in "TZ", run)
            if state_of(pid) == "T":
                return pid
        except OSError:
            continue


def hidden(shell):
    return list((shell.folder / "kept").glob(".step-*"))


def resumed(steered):
    on = steered("--workers", 3, "--checkpoint", "kept", "--resume", "kept", seconds=0.0)
    code, err = on.end()
    assert code == 0, err
    return on.result


def test_the_run_is_that_of_one_left_alone(steered, shell, undisturbed):
    run = steered(*ASYNC, "--every", 7, seconds=0.02)
    code, err = run.end()
    assert code == 0, err
    assert run.result == undisturbed and "FAIL" not in err
    assert 60 in steps_of(shell) and not hidden(shell)
    for path in checkpoint.steps_in(shell.folder / "kept")[:-1]:
        on = steered("--workers", 1, "--resume", path, seconds=0.0)
        assert on.end()[0] == 0
        assert on.result == undisturbed


def test_kills_of_the_writer_are_named_and_the_next_one_tries_again(steered, shell, undisturbed):
    run = steered(*ASYNC, "--every", 1, seconds=0.03)
    num_killed = 0
    while run.process.poll() is None and num_killed < 10:
        for pid in writers(shell):
            try:
                os.kill(pid, signal.SIGKILL)
                num_killed += 1
            except ProcessLookupError:
                continue
    code, err = run.end()
    assert code == 0, err
    assert run.result == undisturbed and num_killed
    assert "SAVING FAILS. The checkpoint of step" in err and "was killed (SIGKILL)" in err
    assert "Saving works again" in err
    assert checkpoint.load_newest(shell.folder / "kept") and 60 in steps_of(shell) and not hidden(shell)
    assert resumed(steered) == undisturbed


def test_a_worker_dies_while_a_checkpoint_is_written_and_the_write_goes_on(steered, shell, undisturbed):
    run = steered(*ASYNC, "--every", 10)
    pid = stopped_writer(run, shell)
    before = steps_of(shell)
    first = next(worker for worker in workers_of(run) if worker != pid)
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: len(set(workers_of(run)) - {first, pid}) == 2 and first not in workers_of(run), run)
    run.read_until("step 25")
    assert steps_of(shell) == before and state_of(pid) == "T", "training did not wait"
    os.kill(pid, signal.SIGCONT)
    code, err = run.end()
    assert code == 0, err
    assert run.result == undisturbed
    assert re.search("start again|replicas moved", err) and "FAIL" not in err
    assert 60 in steps_of(shell)
    assert all(checkpoint.read(path) for path in checkpoint.steps_in(shell.folder / "kept"))
    assert resumed(steered) == undisturbed


@pytest.mark.parametrize("seed", [0, *[pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 20)]])
def test_the_supervisor_dies(steered, shell, undisturbed, seed):
    draw = random.Random(seed)
    run = steered(*ASYNC, "--every", 2, seconds=0.03)
    run.read_until(f"step {draw.randrange(8, 40)}")
    time.sleep(draw.random() * 0.06)
    run.process.kill()
    run.end()
    assert shell.is_gone_within(5), "workers and writer end with it"
    newest, skipped = checkpoint.load_newest(shell.folder / "kept")
    assert not skipped, "what has a name is whole"
    last = max(int(line.split()[1]) for line in run.lines if line.startswith("step "))
    # At most what was trained while one was written, and until the next was due: a quarter of the run is plenty here.
    assert last - newest.step < 15
    shell.samestep("ps")  # removes the door of the dead run
    assert resumed(steered) == undisturbed
    assert not hidden(shell)


@pytest.mark.long
def test_ctrl_c_writes_the_last_one_and_lets_the_other_be_finished(steered, shell, undisturbed):
    run = steered(*ASYNC, "--every", 10)
    pid = stopped_writer(run, shell)
    number = int(run.process.stdout.readline().split()[1])
    run.read_until(f"step {number + 3}")
    before = steps_of(shell)
    run.process.send_signal(signal.SIGINT)
    wait_for(lambda: steps_of(shell) != before, run)
    os.kill(pid, signal.SIGCONT)
    code, err = run.end()
    assert code == 130
    last = steps_of(shell)[-1]
    assert err.splitlines()[-1].endswith(f"the checkpoint after step {last}: go on with --resume kept.")
    assert last % 10 != 0 and last // 10 * 10 in steps_of(shell), "both"
    assert not hidden(shell)
    assert resumed(steered) == undisturbed


@pytest.mark.long
def test_the_second_ctrl_c_ends_the_writer_too(steered, shell):
    run = steered(*ASYNC, "--every", 10)
    stopped_writer(run, shell)
    before = steps_of(shell)
    run.process.send_signal(signal.SIGINT)
    wait_for(lambda: steps_of(shell) != before, run)
    time.sleep(0.3)  # what comes sooner counts as the same signal
    run.process.send_signal(signal.SIGINT)
    code, err = run.end(timeout=30)
    assert code == 130
    assert f"What is kept is the checkpoint after step {steps_of(shell)[-1]}" in err


@pytest.mark.long
def test_when_the_workers_are_gone_the_writer_may_end_its_work(steered, shell):
    """An error that would come again ends the run; what was on its way to the disk still gets there."""
    run = steered(*ASYNC, "--every", 10, mode="fails", seconds=0.02)
    pid = stopped_writer(run, shell)
    run.read_until("fails")
    while line := run.process.stderr.readline():
        if "A checkpoint is still being written. Ctrl-C ends the run without it." in line:
            break
    assert line, "it ended without the writer"
    os.kill(pid, signal.SIGCONT)
    code, err = run.end()
    assert code == 1 and "ValueError: of the script" in err
    assert steps_of(shell) and not hidden(shell)
