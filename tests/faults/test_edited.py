"""A script that is edited while it runs: workers that start again run what the others ran."""

import json
import re
import subprocess
import sys

SCRIPT = """
import os, signal, samestep, torch

def main(run):
    x = torch.randn(64, 4)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run.replicate(model, optimizer)
    for step in run.steps((x, x[:, :1].clone()), 8, epochs=5):
        for a, b in step:
            step.backward((model(a) - b).square().mean())
        step.update()
        if step.number == 17 and run.worker.is_first and not os.path.exists("mark"):
            open("mark", "w").close()
            EDIT
            os.kill(os.getpid(), signal.SIGKILL)
    return step.loss

samestep.launch(main, replicas=4, workers=2)
"""
# Only a script that is read again can differ from one that is gone.
EDITS = {
    "edited": "text = open('train.py').read(); open('train.py', 'w').write(text.replace('lr=0.1', 'lr=0.7'))",
    "deleted": "os.remove('train.py')",
}


def test_the_code_is_that_of_the_start(tmp_path, clean_environment):
    digests = {}
    for name, edit in EDITS.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "train.py").write_text(SCRIPT.replace("EDIT", edit))
        command = [sys.executable, "-m", "samestep", "run", "train.py", "--summary", "summary.json"]
        environment = {**clean_environment, "TMPDIR": str(tmp_path)}
        ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
        assert ended.returncode == 0, ended.stderr
        assert re.search("start again|replicas moved", ended.stderr)
        digests[name] = json.loads((folder / "summary.json").read_text())["weights_digest"]
    assert len(set(digests.values())) == 1, digests
