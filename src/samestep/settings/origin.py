"""Where a run comes from: the lines of its script, and what else in this process changes bits.

Comments, blank lines and spaces are no code: a script that differs in them alone is the same.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import io
import os
import sys
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from importlib import metadata
from types import CodeType
from typing import Any

from samestep.loop.origin import Origin

_VARIABLES = (
    *("MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "OPENBLAS_CORETYPE"),
    *("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"),
)
_CUDA_VARIABLES = ("CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")
_NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.ENCODING, tokenize.ENDMARKER}
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


def origin_of(main: Callable[..., Any], device: str | None) -> Origin:
    """Return where a run of `main` comes from.

    Args:
        main: the user's function.
        device: "cpu" or "cuda"; None is the former.
    """
    variables = (*_VARIABLES, *(_CUDA_VARIABLES if device == "cuda" else ()))
    environment = {name: os.environ[name] for name in variables if name in os.environ}
    for library in ("samestep", "numpy"):
        environment[library] = _version(library)
    code = _code_of(main)
    if code is None:
        return Origin(environment=environment)
    if not os.path.isfile(code.co_filename) and os.path.realpath(code.co_filename) not in _kept:
        script = f"{code.co_name}()"
        return Origin(script=script, code={script: _entry(_tokens_of(code), 0)}, environment=environment)
    script = os.path.basename(code.co_filename)
    files = {script: code.co_filename}
    # A module's path may go through the links that lead to the script, or not.
    for root in {os.path.dirname(turn(code.co_filename)) for turn in (os.path.abspath, os.path.realpath)}:
        files |= {os.path.relpath(path, root): path for path in _imported(root)}
    return Origin(script=script, code={name: lines_of(path) for name, path in files.items()}, environment=environment)


_kept: dict[str, bytes] = {}
"""What `lines_of` told of files whose code this process keeps."""


def keep(path: str) -> None:
    """Keep the lines of a file as they are now, like `Script.keep` its code."""
    _kept[os.path.realpath(path)] = lines_of(path)


def lines_of(path: str) -> bytes:
    """Return the digest and number of each line of code of a Python file (see `Origin.code`); empty if it is gone."""
    if os.path.realpath(path) in _kept:
        return _kept[os.path.realpath(path)]
    try:
        with tokenize.open(path) as file:
            text = file.read()
    except (OSError, SyntaxError, UnicodeDecodeError):
        return b""
    try:
        return b"".join(_entry(line, number) for number, line in _code_lines(text))
    except (tokenize.TokenError, SyntaxError):
        return b"".join(_entry(line.strip(), number) for number, line in enumerate(text.splitlines(), 1))


def _code_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield number and tokens of each logical line, behind its depth."""
    depth, first = 0, 0
    tokens: list[str] = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.INDENT, tokenize.DEDENT):
            depth += 1 if token.type == tokenize.INDENT else -1
        elif token.type == tokenize.NEWLINE:
            yield first, " ".join([str(depth), *tokens])
            tokens = []
        elif token.type not in _NO_CODE:
            first = first if tokens else token.start[0]
            tokens.append(token.string)


def _entry(line: str, number: int) -> bytes:
    return hashlib.sha256(line.encode()).digest()[:4] + number.to_bytes(4, "little")


def _code_of(main: Any) -> CodeType | None:
    while isinstance(main, functools.partial):
        main = main.func
    main = inspect.unwrap(main)
    if not hasattr(main, "__code__") and not hasattr(main, "__func__"):
        main = type(main).__call__
    return getattr(getattr(main, "__func__", main), "__code__", None)


def _tokens_of(code: CodeType) -> str:
    """Return what a function without a file does, as text. Another version of Python gives other text."""
    parts = []
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            parts.append(_tokens_of(constant))
        else:
            # The order of a set of text is another in each process.
            parts.append(str(sorted(map(repr, constant))) if isinstance(constant, frozenset) else repr(constant))
    return repr((code.co_code, parts, code.co_names, code.co_varnames, code.co_freevars))


def _imported(root: str) -> Iterator[str]:
    """Yield the files of imported modules that lie in `root` and belong to nobody else."""
    paths = sysconfig.get_paths()
    foreign = (_PACKAGE, *(paths[name] + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")))
    for module in list(sys.modules.values()):
        path = str(getattr(module, "__file__", None))
        is_near = path.endswith(".py") and path.startswith(os.path.join(root, ""))
        if is_near and not path.startswith(foreign) and "site-packages" not in path:
            yield path


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "of a source tree"
