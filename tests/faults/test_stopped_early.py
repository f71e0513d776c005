"""A worker that is stopped before it takes part in the run holds the others up as well."""

import re
import subprocess
import sys

SCRIPT = """
import os, signal, samestep, torch

def main(run):
    x = torch.randn(64, 4)
    model = torch.nn.Linear(4, 1)
    run.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for step in run.steps((x,), 8, epochs=2):
        for (a,) in step:
            step.backward(model(a).square().mean())
        step.update()
    return step.loss

if not os.path.exists("mark"):
    open("mark", "w").close()
    os.kill(os.getpid(), signal.SIGSTOP)
samestep.launch(main, replicas=4, workers=2)
"""


def test_it_is_found_and_replaced(tmp_path, clean_environment):
    (tmp_path / "train.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "samestep", "run", "train.py", "--workers", "2"]
    environment = {**clean_environment, "TMPDIR": str(tmp_path)}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert "SIGSTOP" in ended.stderr and re.search("start again|replicas moved", ended.stderr)
