import json
import os
import signal

import pytest
from shell import MARK, Shell

import samestep

SUMMARY = ("weights_digest", "optimizer_digest", "samples_digest", "seconds", "samples_per_second", "peak_memory_bytes")


def result_of(ended, line=1):
    return json.loads(ended.out.splitlines()[line])


@pytest.fixture(scope="module")
def alone(tmp_path_factory, script):
    """One worker, where as many as cores were forked; replicas=4, seed 0."""
    return Shell(tmp_path_factory.mktemp("alone")).samestep("run", script, "--", "exits", "workers=1")


def test_run_from_the_command_line(shell, script):
    facts_path = shell.folder / "facts.json"
    ended = shell.samestep(
        "run", script, "--workers", 2, "--threads", 2, "--seed", 3, "--summary", facts_path, "--", "plain", "replicas=4"
    )
    assert ended.code == 0, ended.err
    result = result_of(ended)
    assert ended.out.splitlines()[0::2] == ["before", "after in a worker"], "only the first worker's prints are shown"
    assert result["workers"] == 2
    assert result["argv"] == ["plain", "replicas=4"]
    assert result["path"] == str(script.parent)
    assert result["threads"] == 2
    assert result["listening"] == []
    facts = json.loads(facts_path.read_text())
    assert facts["weights_digest"] == result["digest"]
    assert facts["result"] == result
    assert (facts["workers"], facts["replicas"], facts["threads"], facts["seed"]) == (2, 4, 2, 3)
    assert facts["samples_exactly_once"] is True
    assert all(facts[name] for name in SUMMARY)
    assert "64 of 64 samples exactly once" in ended.err
    assert list(shell.temporary.iterdir()) == []


def test_the_number_of_workers_is_what_the_script_wants_and_changes_nothing(shell, script, alone):
    more = shell.samestep("run", script, "--", "plain", f"workers={len(os.sched_getaffinity(0)) + 1}", "replicas=64")
    assert more.code == 0, more.err
    assert result_of(more, -2)["workers"] == len(os.sched_getaffinity(0)) + 1
    other = shell.samestep("run", script, "--workers", "3", "--", "plain")
    assert result_of(other)["workers"] == 3
    assert result_of(alone)["workers"] == 1
    assert result_of(other)["digest"] == result_of(alone)["digest"]


def test_the_scripts_own_exit_code_is_kept(alone):
    assert alone.code == 5


def test_a_script_by_itself_may_launch_several_times(shell, script, alone):
    ended = shell.python(script, "twice", "workers=2")
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    assert [lines[0], lines[-1]] == ["before", "after"], "what workers repeat is not shown"
    assert len(lines) == 5
    assert result_of(ended)["digest"] == result_of(ended, 2)["again"] == result_of(alone)["digest"]
    assert result_of(ended)["workers"] == 2
    assert result_of(ended)["argv"] == ["twice", "workers=2"]
    assert result_of(ended)["listening"] == []
    assert ended.err.count("64 of 64 samples") == 3
    # What cannot travel is None, and said.
    assert lines[3] == "null"
    assert "the result is a object" in ended.err
    assert "launch() returns None" in ended.err
    # torch makes this folder itself, in the script's own process.
    assert [path.name for path in shell.temporary.iterdir() if not path.name.startswith("torchinductor_")] == []


def test_a_failure_is_one_message_and_exit_code_1(shell, script):
    ended = shell.python(script, "fails", "workers=2")
    assert ended.code == 1
    assert ended.err.count("ValueError: planted") == 1
    assert ended.err.count("Traceback") == 1
    assert "in main\n" in ended.err
    assert "in worker 1; the run has ended." in ended.err
    assert "after" not in ended.out


def test_more_workers_than_replicas(shell, script):
    ended = shell.samestep("run", script, "--workers", 5, "--", "plain")
    assert ended.code == 2
    assert ended.err.splitlines()[-1] == (
        "samestep: You set workers=5 but replicas=4, so 1 worker would idle. Use --workers 4, or replicas=5 (a new "
        "recipe: results change)."
    )
    assert "Traceback" not in ended.err
    assert list(shell.temporary.iterdir()) == []


def test_ctrl_c_and_a_killed_caller_leave_nothing(shell, script):
    caller = shell.start(script, "sleeps", "workers=2")
    assert [caller.stdout.readline(), caller.stdout.readline()] == ["before\n", "step 0\n"]
    assert len(shell.processes()) == 4
    caller.send_signal(signal.SIGINT)
    _, err = caller.communicate(timeout=60)
    assert caller.returncode == 130
    assert err.splitlines()[-1].startswith("samestep: SIGINT ended the run. Nothing is kept, because no checkpoint")
    assert "Traceback" not in err
    assert shell.processes() == []

    caller = shell.start(script, "sleeps", "workers=2")
    assert [caller.stdout.readline(), caller.stdout.readline()] == ["before\n", "step 0\n"]
    caller.kill()
    assert shell.is_gone_within(10)
    caller.communicate()


def test_verify(shell, script):
    same = shell.samestep("verify", script, "--workers", "1,2,3", "--steps", 3, "--", "plain")
    assert same.code == 0, same.err + same.out
    assert "The same bits at every step" in same.out
    assert same.out.count("│ same │") == 3
    assert "before" not in same.out
    other = shell.samestep("verify", script, "--workers", "1,2", "--steps", 4, "--", "uneven")
    assert other.code == 1
    assert "Step 2 is the first to differ between the runs with 2 workers and with 1: tensor" in other.out
    assert "atomics" in other.out
    assert "run.worker" in other.out


NOTEBOOK = """
import threading, sys
import torch, samestep

def main(run):
    model = torch.nn.Linear(4, 3)
    run.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for step in run.steps((torch.randn(64, 4),), batch_size=16, steps=2):
        for (shard,) in step:
            step.backward(model(shard).square().mean() * scale)
        step.update()
    print("printed by the worker")
    if scale == 3.0:
        raise ValueError("planted")
    return {"weight": model.weight.detach().clone(), "scale": scale}

scale = 2.0
result = samestep.launch(main, workers=2)
print(result["scale"], tuple(result["weight"].shape))
scale = 3.0
try:
    samestep.launch(main, workers=2)
except samestep.WorkerError as error:
    assert "ValueError: planted" in str(error), error
    print("raised WorkerError")
lock = threading.Lock()
for call in (lambda: samestep.launch(lambda run: lock), lambda: samestep.launch(main, workers=0)):
    try:
        call()
    except samestep.SettingsError as error:
        print("raised SettingsError:", error)
try:
    samestep.launch(7)
except samestep.UsageError as error:
    print("raised UsageError:", error)
"""


def test_a_function_at_a_prompt_travels_by_value(shell):
    ended = shell.python("-c", NOTEBOOK)
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    assert lines[:2] == ["printed by the worker", "2.0 (3, 4)"]
    # The run that fails may end before its first worker has printed, or in the middle of its line.
    failed, unsendable, idle, called = filter(None, (line.removeprefix(lines[0]) for line in lines[2:]))
    assert failed == "raised WorkerError"
    assert "it uses `lock` (_thread.lock)" in unsendable
    assert "You set workers=0" in idle
    assert "launch() was given 7" in called


def test_prints_reach_a_process_whose_streams_are_not_descriptors(shell, capsys, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(shell.temporary))
    monkeypatch.setenv(MARK, shell.mark)
    seen = 3

    def main(run):
        import torch

        print("printed by worker", run.worker.rank)
        model = torch.nn.Linear(2, 2)
        run.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1))
        raise ValueError(f"planted {seen}")

    with pytest.raises(samestep.WorkerError, match="ValueError: planted 3") as caught:
        samestep.launch(main, workers=1)
    assert "test_scripts.py" in str(caught.value)
    assert capsys.readouterr().out == "printed by worker 0\n"


def test_under_torchrun_the_same_script_gives_the_same_weights(shell, script, alone):
    launched = shell.python(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, script, "plain", "replicas=4"
    )
    assert launched.code == 0, launched.err
    digests = {json.loads(line)["digest"] for line in launched.out.splitlines() if line.startswith("{")}
    assert digests == {result_of(alone)["digest"]}
    assert launched.err.count("64 of 64 samples") == 1
