"""What the command line refuses, before torch is imported."""

import pytest


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "missing.py"], "There is no script missing.py."),
        (["run", "."], ". is a folder."),
        (["run", "locked.py"], "locked.py cannot be read"),
        (["run", "good.py", "--workers", "0"], "You set workers=0"),
        (["run", "good.py", "--workers", "-1"], "You set workers=-1"),
        (["run", "good.py", "--threads", "0"], "You set threads=0"),
        (["run", "good.py", "--replicas", "0"], "You set replicas=0"),
        (["run", "good.py", "--replicas", "x"], "You set --replicas x"),
        (["run", "good.py", "--workers", "9", "--replicas", "8"], "so 1 worker would idle"),
        (["run", "good.py", "--every", "0"], "You set every=0"),
        (["run", "good.py", "--device", "tpu"], "You set device='tpu'"),
        (["run", "good.py", "--accept", "code,model"], "You set accept='model'"),
        (["run", "good.py", "--summary", "no/such/folder.json"], "not a folder one can write to"),
        (["verify", "missing.py"], "There is no script missing.py."),
        (["verify", "good.py", "--workers", "2"], "at least two numbers"),
        (["verify", "good.py", "--workers", "1,x"], "You set --workers 1,x"),
        (["verify", "good.py", "--workers", "0,1"], "You set --workers 0,1"),
        (["verify", "good.py", "--workers", "1,9", "--replicas", "8"], "would idle"),
        (["verify", "good.py", "--steps", "0"], "You set --steps 0"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(invoke, arguments, words):
    code, out, err = invoke(*arguments)
    assert code == 2
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("samestep: ")
    assert words in line


def test_a_script_that_is_not_python_is_shown_as_python_shows_it(invoke):
    code, _, err = invoke("run", "broken.py")
    assert code == 1
    assert "SyntaxError" in err
    assert 'broken.py", line 2' in err
    assert "samestep" not in err


def test_options_of_the_script_belong_behind_two_dashes(invoke):
    code, _, err = invoke("run", "good.py", "--lr", "1")
    assert code == 2
    assert "--lr" in err


def test_version_and_help(invoke):
    code, out, _ = invoke("--version")
    assert (code, out.split()[0]) == (0, "samestep")
    code, out, _ = invoke("--help")
    assert code == 0
    assert "run" in out
    assert "verify" in out


def test_the_command_line_and_the_face_do_not_import_torch(shell):
    ended = shell.python(
        "-c",
        "import sys, samestep, samestep.cli.commands; samestep.launch, samestep.SettingsError;"
        "print([name for name in ('torch', 'numpy') if name in sys.modules])",
    )
    assert ended.out.strip() == "[]", ended.err


def test_the_face_holds_what_it_names():
    import samestep

    assert sorted(samestep.__all__) == samestep.__all__
    assert dir(samestep) == sorted([*samestep.__all__, "codecs"])
    for name in samestep.__all__:
        assert getattr(samestep, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'lunch'"):
        samestep.lunch  # noqa: B018


@pytest.fixture
def invoke(tmp_path, monkeypatch):
    from click.testing import CliRunner

    from samestep.cli.commands import main
    from samestep.launching import zygote

    def refuse(modules):
        raise AssertionError("torch was about to be imported")

    monkeypatch.setattr(zygote, "warm", refuse)
    monkeypatch.setattr("samestep.launching.environment.prepare", lambda: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.py").write_text("import samestep\n")
    (tmp_path / "broken.py").write_text("x = 1\ny = (\n")
    (tmp_path / "locked.py").symlink_to("locked.py")

    def call(*arguments):
        result = CliRunner().invoke(main, list(arguments))
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.stdout, result.stderr

    return call
