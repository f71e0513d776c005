"""A live run is found, grows, shrinks and stops by command, and its result is that of a run left alone."""

import json
import os
import stat
import time

import pytest


def test_a_run_that_grows_and_shrinks_gives_the_same_bits(steered, shell, undisturbed):
    run = steered("--workers", 2, "--summary", "facts.json", seconds=0.2)
    run.read_until("step 3")
    (line,) = shell.samestep("ps").out.splitlines()[1:]
    name, workers, step, of, steps, *speed = line.split()
    assert (name.rpartition("-")[0], workers, of, steps) == ("steered", "2", "of", "60")
    assert 1 <= int(step) < 30 and speed
    folder = shell.temporary / f"samestep-{os.getuid()}"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700

    too_many = shell.samestep("scale", "steered", "--workers", 9)
    assert (too_many.code, too_many.out) == (2, "")
    assert "You set workers=9 but replicas=4, so 5 workers would idle." in too_many.err
    assert shell.samestep("scale", "steered", "--workers", 0).code == 2
    assert run.process.poll() is None
    for count in (3, 1):
        ended = shell.samestep("scale", name, "--workers", count)
        assert (ended.code, ended.out) == (0, f"{name}: now {count} worker{'s' * (count > 1)}.\n"), ended.err
    assert f"{name}  1  " in " ".join(shell.samestep("ps").out.split()).replace(" ", "  ")

    code, err = run.end()
    assert code == 0, err
    assert run.result == undisturbed
    shown = [line for line in run.lines if line.startswith("step ")]
    assert shown == [f"step {number}" for number in range(60)], "each step is shown once"
    assert err.index("samestep: Now 3 workers.") < err.index("samestep: Now 1 worker.")
    facts = json.loads((shell.folder / "facts.json").read_text())
    assert facts["workers"] == 1 and facts["samples_exactly_once"]
    assert "Scaled while it ran, to 3 workers, then 1 worker." in facts["notes"]
    assert shell.samestep("ps").err == "samestep: No run of yours is live on this host.\n"


def test_stop_by_name_and_a_wait_that_is_too_short(steered, shell):
    run = steered("--workers", 2, "--checkpoint", "kept", mode="shard", seconds=0.0)
    run.read_until("in a shard")
    late = shell.samestep("scale", "steered", "--workers", 3, "--timeout", 0.3)
    assert late.code == 1
    assert "has not come to the end of its step within 0.3 s" in late.err
    nobody = shell.samestep("stop", "another")
    assert (nobody.code, nobody.out) == (2, "")
    assert f"These do: steered-{run.process.pid}." in nobody.err
    ended = shell.samestep("stop", "steered")
    assert ended.code == 0, ended.err
    assert ended.out == (
        f"steered-{run.process.pid}: samestep: SIGTERM ended the run. Nothing is kept: no checkpoint had been written "
        "to kept yet.\n"
    )
    assert run.end()[0] == 143


def test_what_a_killed_run_leaves_is_removed_by_ps(steered, shell):
    run = steered()
    run.read_until("step 1")
    run.process.kill()
    run.end()
    assert shell.is_gone_within(10)
    folder = shell.temporary / f"samestep-{os.getuid()}"
    assert len(list(folder.iterdir())) == 1
    assert shell.samestep("ps").err == "samestep: No run of yours is live on this host.\n"
    assert not folder.exists()


@pytest.mark.long
def test_a_script_by_itself_can_be_scaled_where_it_says_how_many_workers(steered, shell, undisturbed):
    run = steered(by=(), seconds=0.1)
    run.read_until("step 3")
    begin = time.monotonic()
    ended = shell.samestep("scale", "steered", "--workers", 4)
    assert ended.code == 0, ended.err
    assert time.monotonic() - begin < 30
    code, err = run.end()
    assert code == 0, err
    assert run.result == undisturbed
    assert "samestep: Now 4 workers." in err
