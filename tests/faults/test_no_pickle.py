"""Training, saving and resuming read no pickle: every way into it raises, in the workers and in their parent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import samestep

SCRIPT = """
import io, json, pickle, sys
import _pickle

class Refused(Exception): pass

def refuse(*args, **kwargs):
    raise Refused("a pickle was about to be read")

class Refusing:
    def __init__(self, *args, **kwargs):
        refuse()

def watch(event, arguments):
    # What imported a reader of pickles before this line is seen here.
    if event == "pickle.find_class":
        refuse()

planted = pickle.dumps(json.JSONEncoder)
load_kept_from_before = pickle.loads
for module in (pickle, _pickle):
    module.load = module.loads = refuse
    module.Unpickler = Refusing
pickle._Unpickler = pickle._load = pickle._loads = Refusing
sys.addaudithook(watch)

import torch
import samestep

def is_refused(way):
    try:
        way()
    except Refused:
        return True
    return False

def main(run):
    torch.manual_seed(run.recipe.seed)
    model = torch.nn.Linear(4, 3)
    run.replicate(model, torch.optim.AdamW(model.parameters()))
    x = torch.arange(256.0).reshape(64, 4) / 256
    for step in run.steps((x,), batch_size=16, steps=6):
        for (shard,) in step:
            step.backward(model(shard).square().mean())
        step.update()
    if "planted" in sys.argv:
        file = io.BytesIO()
        torch.save({"x": torch.ones(2)}, file)
        file.seek(0)
        ways = (
            lambda: pickle.loads(planted), lambda: load_kept_from_before(planted),
            lambda: torch.load(file, weights_only=False),
        )
        return [is_refused(way) for way in ways]
    run.save("mine")
    run.load("mine")
    return {"digest": run.digest(), "mean": run.mean(lambda b: model(b[0]).sum(1), (x,), batch_size=16)}

if __name__ == "__main__":
    print(json.dumps(samestep.launch(main, replicas=4)))
"""


def play(folder: Path, *arguments: str):
    (folder / "script.py").write_text(SCRIPT)
    source = str(Path(samestep.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-m", "samestep", "run", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": source},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_no_pickle_is_read(tmp_path):
    first = play(tmp_path, "script.py", "--workers", "2", "--checkpoint", "runs/x", "--every", "2")
    assert first.returncode == 0, first.stderr
    resumed = play(tmp_path, "script.py", "--workers", "3", "--resume", "runs/x/step-00000004")
    assert resumed.returncode == 0, resumed.stderr
    assert "Resumed from runs/x/step-00000004" in resumed.stderr
    assert json.loads(resumed.stdout) == json.loads(first.stdout)


def test_a_planted_pickle_is_seen(tmp_path):
    ended = play(tmp_path, "script.py", "--workers", "2", "--", "planted")
    assert json.loads(ended.stdout) == [True, True, True], ended.stderr
