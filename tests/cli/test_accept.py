"""A resume after something changed, as a person meets it: refused with a line to paste, then accepted and noted."""

import json
import re
import shutil

import numpy as np
import pytest
from shell import Shell

SCRIPT = """
import json, sys
import numpy as np, torch
import samestep

def main(run):
    model = torch.nn.Linear(4, 3)
    run.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for step in run.steps(torch.from_numpy(np.load("data.npy")), batch_size=16, steps=4):
        for shard in step:
            step.backward(model(shard).square().mean())
        step.update()
    return run.digest()

samestep.launch(main, replicas=4)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train to the end with checkpoints; return the folder, and the facts of the run."""
    shell = Shell(tmp_path_factory.mktemp("trained"))
    (shell.folder / "train.py").write_text(SCRIPT)
    np.save(shell.folder / "data.npy", np.random.default_rng(0).random((64, 4), dtype=np.float32))
    settings = ["--workers", 2, "--checkpoint", "runs", "--every", 2, "--summary", "facts.json"]
    ended = shell.samestep("run", "train.py", *settings)
    assert ended.code == 0, ended.err
    return shell.folder, json.loads((shell.folder / "facts.json").read_text())


@pytest.fixture
def resume(shell, trained):
    """Return what resumes from half of it, in a folder of its own."""
    folder, whole = trained
    shutil.copytree(folder, shell.folder, dirs_exist_ok=True)
    facts = shell.folder / "facts.json"

    def call(*arguments):
        path = "runs/step-00000002"
        ended = shell.samestep("run", "train.py", "--workers", 1, "--resume", path, "--summary", facts, *arguments)
        return ended, json.loads(facts.read_text()) if ended.code == 0 else None

    call.whole, call.environment = whole, shell.environment
    call.script, call.data = shell.folder / "train.py", shell.folder / "data.npy"
    return call


def assert_refused_then_accepted(resume, kind):
    """See that it is refused; paste the flag that the message names; return the message and the facts."""
    ended, _ = resume()
    assert ended.code == 1
    message = ended.err[ended.err.index("samestep: ") :].rstrip().splitlines()
    assert len(message) == 4
    flag = re.search(r"(--accept) ([a-z,]+)", message[3])
    assert flag[2] == kind
    accepted, facts = resume(*flag.groups())
    assert accepted.code == 0, accepted.err
    assert "Accepted: other " + kind in accepted.err
    assert any(note.startswith(f"Accepted: other {kind}") for note in facts["notes"])
    return message, facts


def test_nothing_changed_but_comments(resume):
    resume.script.write_text("# A comment.\n" + SCRIPT.replace("lr=0.1))", "lr=0.1))  # why\n"))
    ended, facts = resume()
    assert ended.code == 0, ended.err
    assert facts["weights_digest"] == resume.whole["weights_digest"]
    assert not any("Accepted" in note for note in facts["notes"])


def test_another_script(resume):
    resume.script.write_text(SCRIPT.replace("square().mean()", "abs().mean()"))
    message, facts = assert_refused_then_accepted(resume, "code")
    assert message[1] == "  code there: train.py (12 lines of code, only there line 11)"
    assert message[2] == "  code here: train.py (12 lines of code, only here line 11)"
    assert facts["weights_digest"] != resume.whole["weights_digest"]


@pytest.mark.long
def test_another_environment(resume):
    resume.environment["MKL_CBWR"] = "COMPATIBLE"
    message, _ = assert_refused_then_accepted(resume, "environment")
    assert message[1:3] == ["  environment there: MKL_CBWR AUTO", "  environment here: MKL_CBWR COMPATIBLE"]


@pytest.mark.long
def test_other_data(resume):
    np.save(resume.data, np.load(resume.data) + 1)
    message, _ = assert_refused_then_accepted(resume, "data")
    assert re.match(r"  data there: 64 samples, content \w{8}$", message[1])


def test_launch_accepts_too(resume):
    accepting = SCRIPT.replace("replicas=4)", "replicas=4, accept='code, environment')")
    resume.script.write_text(accepting)
    ended, facts = resume()
    assert ended.code == 0, ended.err
    assert facts["weights_digest"] == resume.whole["weights_digest"]
    assert any("other code" in note for note in facts["notes"])
