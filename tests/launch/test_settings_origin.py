"""What counts as code, and what of the environment is written down."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import pytest

import samestep
from samestep.loop.origin import ENTRY_BYTES, digests_of
from samestep.settings.origin import lines_of, origin_of

SOURCE = str(Path(samestep.__file__).parents[1])

TEXT = '''import math

# A comment.
def main(run):
    """Words."""
    x = [1,
         2]
    if x:
        x = math.pi
    return x
'''

SAME = {
    "comments": lambda text: text.replace("# A comment.", "# Another.\n# More."),
    "comment behind": lambda text: text.replace("math.pi", "math.pi  # why"),
    "blank lines": lambda text: text.replace("\n", "\n\n"),
    "line breaks": lambda text: text.replace("[1,\n         2]", "[1, 2]"),
    "indentation": lambda text: text.replace("    ", "  "),
    "no last newline": str.rstrip,
}
OTHER = {
    "a number": lambda text: text.replace("2]", "3]"),
    "text": lambda text: text.replace("Words", "Other words"),
    "depth": lambda text: text.replace("    return x", "        return x"),
    "order": lambda text: text.replace("import math\n", "") + "import math\n",
}


def digests(folder, text):
    path = folder / "script.py"
    path.write_text(text)
    return digests_of(lines_of(str(path)))


@pytest.mark.parametrize("change", SAME)
def test_no_code(change, tmp_path):
    assert SAME[change](TEXT) != TEXT
    assert digests(tmp_path, SAME[change](TEXT)) == digests(tmp_path, TEXT)


@pytest.mark.parametrize("change", OTHER)
def test_code(change, tmp_path):
    assert digests(tmp_path, OTHER[change](TEXT)) != digests(tmp_path, TEXT)


def test_numbers_of_lines(tmp_path):
    (tmp_path / "script.py").write_text(TEXT)
    lines = lines_of(str(tmp_path / "script.py"))
    numbers = [int.from_bytes(lines[i + 4 : i + 8], "little") for i in range(0, len(lines), ENTRY_BYTES)]
    assert numbers == [1, 4, 5, 6, 8, 9, 10]


@pytest.mark.parametrize("text", ["x = (\n", "x = '''", "\x00\n", "  x\n y\n", b"\xff\xfe"])
def test_what_is_not_python_is_no_error(text, tmp_path):
    path = tmp_path / "script.py"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert isinstance(lines_of(str(path)), bytes)
    assert lines_of(str(tmp_path / "nowhere.py")) == b""


def test_functions_of_a_file():
    name = Path(__file__).name
    assert origin_of(test_no_code, None).script == name
    assert origin_of(functools.partial(test_no_code, "comments"), None).script == name
    assert origin_of(Called(), None).script == origin_of(Called().method, None).script == name
    assert origin_of(test_no_code, None).code[name] == lines_of(__file__)


class Called:
    def __call__(self, run):
        pass

    def method(self, run):
        pass


def compiled(body):
    names = {}
    exec(compile(f"def main(run):\n{body}", "<cell>", "exec"), names)
    return names["main"]


def test_functions_without_a_file():
    first, same, other = (
        origin_of(compiled(body), None)
        for body in ("    return run in {0, 8}", "\n    return run in {8, 0}", "    return run in {0, 9}")
    )
    assert first.script == "main()"
    assert digests_of(first.code["main()"]) == digests_of(same.code["main()"]) != digests_of(other.code["main()"])


def test_a_callable_of_no_python_is_unknown():
    assert origin_of(print, None).script == ""
    assert origin_of(print, None).code == {}


def test_what_the_script_imports_from_its_folder(tmp_path):
    real = tmp_path / "real"
    (real / "parts").mkdir(parents=True)
    (real / "model.py").write_text("x = 1\n")
    (real / "unused.py").write_text("x = 1\n")
    (real / "parts" / "__init__.py").write_text("")
    (real / "parts" / "layer.py").write_text("x = 1\n")
    (real / "train.py").write_text(
        f"import sys\nsys.path.append({SOURCE!r})\n"
        "import model, parts.layer\nfrom samestep.settings.origin import origin_of\n"
        "def main(run): pass\nprint(sorted(origin_of(main, None).code))\n"
    )
    (tmp_path / "link").symlink_to(real)
    for folder in ("real", "link"):
        ended = subprocess.run([sys.executable, tmp_path / folder / "train.py"], capture_output=True, text=True)
        assert ended.stdout.strip() == "['model.py', 'parts/__init__.py', 'parts/layer.py', 'train.py']", ended.stderr


def test_variables_that_change_bits(monkeypatch):
    for name in ("MKL_CBWR", "NVIDIA_TF32_OVERRIDE", "ONEDNN_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MKL_CBWR", "AVX2")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    found = origin_of(test_no_code, "cpu").environment
    assert set(found) == {"MKL_CBWR", "samestep", "numpy"}
    assert found["MKL_CBWR"] == "AVX2"
    assert origin_of(test_no_code, "cuda").environment["NVIDIA_TF32_OVERRIDE"] == "0"
