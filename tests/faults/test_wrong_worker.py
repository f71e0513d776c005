"""A worker that computes wrong ends a run that is audited, by name; once, and it would have started again."""

import re
import subprocess
import sys

SCRIPT = """
import samestep, torch

def main(run):
    x = torch.randn(64, 4)
    model = torch.nn.Linear(4, 1)
    run.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1), audit=1)

    def broken(gradient):
        return gradient * 1.0000001 if run.worker.rank == 1 and step.number >= 3 else gradient

    model.weight.register_hook(broken)
    for step in run.steps((x, x[:, :1].clone()), 8, epochs=5):
        for a, b in step:
            step.backward((model(a) - b).square().mean())
        step.update()

samestep.launch(main, replicas=3, workers=3)
"""


def test_a_worker_that_computes_wrong_is_named_and_ends_the_run(tmp_path, clean_environment):
    (tmp_path / "train.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "samestep", "run", "train.py"]
    environment = {**clean_environment, "TMPDIR": str(tmp_path)}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1, ended.stderr
    told = " ".join(ended.stderr.replace("│", " ").split())
    assert "came to different bits, in the gradient of 'weight'. Then all workers computed it once more." in told
    named = r"Not the bits of the majority: worker 1 \(host \S+, pid \d+, cpu\) in 2 of 2 tries\."
    assert len(set(re.findall(named, told))) == 2, told
    assert told.count("start again") == 1 and "came again" in told, told
