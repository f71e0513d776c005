"""`samestep checkpoint`: what lies in a folder, whether it is good, the weights for use elsewhere."""

import os
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from samestep.cli.commands import main
from samestep.errors import CheckpointError
from samestep.storage import checkpoint, stock
from samestep.storage.digest import tensors_digest


def weights(step):
    return {"layer.weight": torch.full((6, 5), float(step)), "layer.bias": torch.full((6,), step / 3)}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for step in (1, 2, 3):
        checkpoint.write("runs/x", step=step, weights=weights(step), state={"m": torch.ones(3)}, facts={})
    return tmp_path / "runs" / "x"


def flip(path: Path, position=-2):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def call(*arguments):
    result = CliRunner().invoke(main, ["checkpoint", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join(result.stdout.split()), result.stderr


def test_a_list_shows_every_step_and_what_is_plainly_missing(folder):
    code, out, _ = call("list", folder)
    assert code == 0 and out.count("whole") == 3
    for step in (1, 2, 3):
        assert f"step-0000000{step}" in out and tensors_digest(weights(step).items()) in out
    (folder / "step-00000002" / "state.safetensors").unlink()
    (folder / "step-00000003" / "manifest.json").write_text("{")
    code, out, _ = call("list", folder)
    assert code == 0 and out.count("whole") == 1
    assert "step-00000002/state.safetensors is damaged" in out and "step-00000003/manifest.json is damaged" in out


def test_verify_reads_all_and_names_file_and_tensor(folder):
    code, out, _ = call("verify", folder)
    assert code == 0 and "All 3 good" in out
    flip(folder / "step-00000002" / "weights.safetensors")
    code, out, _ = call("verify", folder)
    assert code == 1 and "1 of 3 damaged" in out
    assert "step-00000002/weights.safetensors" in out and "'layer.weight'" in out
    assert call("verify", folder / "step-00000002")[0] == 1
    assert call("verify", folder / "step-00000003")[0] == 0
    # A list does not read that far, and says so.
    assert "reads every byte" in call("list", folder)[1]


def test_export_is_plain_and_of_the_newest_good(folder):
    code, out, _ = call("export", folder, "a.safetensors")
    assert code == 0 and "2 tensors" in out and "step-00000003" in out
    assert tensors_digest(sorted(load_file("a.safetensors").items())) == tensors_digest(sorted(weights(3).items()))
    flip(folder / "step-00000003" / "facts.frame")
    code, out, _ = call("export", folder, "b.safetensors")
    assert code == 0 and "Skipped step-00000003" in out and "facts.frame" in out and "step-00000002 are in" in out
    assert tensors_digest(sorted(load_file("b.safetensors").items())) == tensors_digest(sorted(weights(2).items()))
    code, _, _ = call("export", folder / "step-00000001", "c.safetensors")
    assert code == 0 and load_file("c.safetensors")["layer.bias"][0] == torch.tensor(1 / 3)
    code, _, err = call("export", folder / "step-00000003", "d.safetensors")
    assert code == 1 and "facts.frame" in err and not Path("d.safetensors").exists()


def test_export_loads_without_samestep(folder, shell):
    call("export", folder, shell.folder / "out.safetensors")
    model = "m = torch.nn.Sequential(); m.add_module('layer', torch.nn.Linear(5, 6))"
    text = (
        f"import torch; from safetensors.torch import load_file; {model}; m.load_state_dict(load_file("
        "'out.safetensors')); import sys; print('samestep' in sys.modules, m.layer.weight.sum().item())"
    )
    ended = shell.python("-c", text)
    assert ended.out.split() == ["False", "90.0"], ended.err


def test_export_never_writes_over_and_leaves_nothing_half(folder, monkeypatch):
    Path("a.safetensors").write_text("mine")
    code, _, err = call("export", folder, "a.safetensors")
    assert code == 1 and "exists" in err and Path("a.safetensors").read_text() == "mine"

    def full(descriptor, data):
        raise OSError(28, "No space left on device")

    before = sorted(os.listdir())
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(CheckpointError, match=r"b.safetensors: No space left on device \(ENOSPC\)"):
            stock.export_weights(folder, "b.safetensors")
    assert sorted(os.listdir()) == before
    code, _, err = call("export", folder, "no/such/folder/c.safetensors")
    assert code == 1 and "could not be written" in err


def test_export_verifies_what_it_wrote(folder, monkeypatch):
    """The disk gives other bytes when it is read the second time."""
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, bytes(data)[:-1] + b"\x55"))
    with pytest.raises(CheckpointError, match="damaged"):
        stock.export_weights(folder, "b.safetensors")
    assert os.listdir() == ["runs"]


def test_rare_dtypes_are_named(tmp_path):
    checkpoint.write(tmp_path / "x", step=1, weights={"c": torch.ones(2, dtype=torch.cfloat)}, state={}, facts={})
    code, out, _ = call("export", tmp_path / "x", tmp_path / "a.safetensors")
    assert code == 0 and out.endswith("knows their dtype: c")


@pytest.mark.parametrize("command", ["list", "verify", "export"])
def test_where_there_is_none(tmp_path, command):
    code, out, err = call(command, tmp_path, *(["x.safetensors"] if command == "export" else []))
    assert code == 1 and out == "" and f"There is no checkpoint in {tmp_path}" in err


def test_a_folder_that_cannot_be_read(folder, monkeypatch):
    def locked(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", locked)
    code, _, err = call("list", folder)
    assert code == 1 and f"{folder} cannot be read: Permission denied (EACCES)" in err
