"""The house rules of `docs/decisions` and the blueprint, held by parsing every file of the package.

Imports point down and never in circles; only the outer rooms know the environment; importing does nothing; no pickle;
files, functions, classes and signatures stay small; the public names are the list below. Each rule is a function from
sources to violations, and each is shown here to find a planted one.
"""

from __future__ import annotations

import ast
import importlib
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "samestep"
SOURCE = Path(__file__).parents[1] / "src" / PACKAGE

ALLOWED: dict[tuple[str, str], int] = {}
"""Known violations, (rule, where) -> size. It may only shrink: an entry that is not needed, or larger than needed,
fails."""

PUBLIC = [
    "Adaptive",
    "Average",
    "BudgetError",
    "CheckpointError",
    "Clients",
    "DataError",
    "EditedWeightsError",
    "Federated",
    "FixedPoint",
    "IntegrityError",
    "Local",
    "Masking",
    "Median",
    "MismatchError",
    "Momentum",
    "Nesterov",
    "NonFiniteError",
    "NormBound",
    "PeerError",
    "Privacy",
    "Run",
    "SamestepError",
    "SettingsError",
    "Sites",
    "Stale",
    "Step",
    "Synchronous",
    "TrimmedMean",
    "UnmaskingError",
    "UsageError",
    "WeightedMean",
    "WorkerError",
    "launch",
]

GROUND = {"errors", "units"}
"""Every room may stand on these; they stand on the standard library."""

ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "units": set(),
    "data": set(),
    "storage": set(),
    "core": {"data.split", "storage"},
    "codecs": {"core"},
    "federated": {"core", "data"},
    "agree": {"core", "codecs", "federated", "storage"},
    "sites": {"core", "codecs", "agree", "storage"},
    "loop": {"data", "core", "agree", "federated", "storage"},
    "measure": {"core", "agree", "data.split"},
    "jobs": {"data", "core.group", "core.tree"},
    "guarding": set(),
    "launching": {"core.worker", "guarding"},
    "settings": {"data", "storage", "core", "federated", "agree", "sites", "loop", "measure", "jobs", "launching"},
    "cli": {"settings"},
    "": {"data", "core", "federated", "agree", "sites", "loop", "measure", "jobs", "launching", "settings"},
    "__main__": {"cli", "launching", "settings"},
}
"""Room -> the rooms, or single modules, it may import besides itself and the ground. "" is the package's own face."""

READS_ENVIRONMENT = {"settings", "launching", "cli"}
READS_PAYLOAD = {f"{PACKAGE}.launching.payload"}
PICKLES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
PICKLING_CALLS = {"torch.load", "torch.save"}
VAGUE = {"common", "helpers", "misc", "util", "utils"}
LIMITS = {"file": 600, "function": 80, "class": 300, "methods": 15, "parameters": 8}


@dataclass(frozen=True, kw_only=True)
class Violation:
    """One broken rule: `size` is what was counted, or 1 where nothing is."""

    rule: str
    where: str
    size: int = 1
    why: str = ""


Sources = dict[str, str]
"""Module name -> its text. A package's `__init__` goes by the package's name followed by ".__init__"."""

Rule = Callable[[Sources], list[Violation]]


def read_sources(folder: Path = SOURCE) -> Sources:
    files = sorted(folder.rglob("*.py"))
    return {".".join((PACKAGE, *f.relative_to(folder).with_suffix("").parts)): f.read_text("utf-8") for f in files}


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] != "__init__" else ""


def imports_of(module: str, tree: ast.AST, modules: set[str]) -> Iterator[str]:
    """Yield every module that `module` imports, absolute, also inside functions and through `import_module("...")`."""
    package = module.rsplit(".", 1)[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join((*above, *filter(None, [node.module])))
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner in modules or f"{inner}.__init__" in modules else base
        elif isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] in {"import_module", "__import__"}:
            yield from (a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str))


def dotted(node: ast.AST) -> str:
    """Return "a.b.c" for such an expression, else ""."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return ""


def graph_of(sources: Sources) -> dict[str, set[str]]:
    """Return, for each module, the modules of the package that it imports."""
    modules = set(sources)
    graph = {}
    for module, text in sources.items():
        found = imports_of(module, ast.parse(text), modules)
        inside = {name for name in found if name.split(".")[0] == PACKAGE}
        graph[module] = {name if name in modules else f"{name}.__init__" for name in inside}
    return graph


def upward_imports(sources: Sources) -> list[Violation]:
    out = []
    for module, targets in graph_of(sources).items():
        room = room_of(module)
        if room not in ROOMS:
            out.append(Violation(rule="room", where=module, why=f"The table knows no room {room!r}."))
            continue
        for target in sorted(targets):
            inner = target.removeprefix(f"{PACKAGE}.").removesuffix(".__init__")
            floors = ROOMS[room] | (GROUND if room not in GROUND else set())
            fits = any(inner == floor or inner.startswith(f"{floor}.") for floor in floors)
            if not fits and room_of(target) != room:
                out.append(Violation(rule="import", where=f"{module} -> {target}", why=f"{room!r} may use {floors}."))
    return out


def circles(sources: Sources) -> list[Violation]:
    graph, out, done = graph_of(sources), [], set()

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            circle = path[path.index(module) :]
            first = circle.index(min(circle))
            out.append(Violation(rule="circle", where=" -> ".join(circle[first:] + circle[:first])))
        elif module not in done:
            for target in sorted(graph.get(module, ())):
                visit(target, [*path, module])
            done.add(module)

    for module in sorted(graph):
        visit(module, [])
    return out


def reads_of_environment(sources: Sources) -> list[Violation]:
    names = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
    out = []
    for module, text in sources.items():
        if room_of(module) in READS_ENVIRONMENT:
            continue
        for node in ast.walk(ast.parse(text)):
            direct = isinstance(node, ast.ImportFrom) and node.module in {"os", "posix"}
            if direct and names & {alias.name for alias in node.names}:
                out.append(Violation(rule="environment", where=module, why=f"line {node.lineno}"))
            if isinstance(node, ast.Attribute) and node.attr in names:
                out.append(Violation(rule="environment", where=module, why=f"line {node.lineno}"))
    return out


def pickles(sources: Sources) -> list[Violation]:
    out = []
    for module, text in sources.items():
        if module in READS_PAYLOAD:
            continue
        tree = ast.parse(text)
        found = [name for name in imports_of(module, tree, set()) if name.split(".")[0] in PICKLES]
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute | ast.Name):
                name = dotted(node)
                # Collectives of objects (all_gather_object, broadcast_object_list) pickle what they move.
                if name in PICKLING_CALLS or name.endswith(("_object", "_object_list")):
                    found.append(name)
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and not is_false(node.value):
                found.append("allow_pickle")
        out += [Violation(rule="pickle", where=f"{module}: {name}") for name in found]
    return out


def is_false(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def work_at_import(sources: Sources) -> list[Violation]:
    """Find statements at module level that do more than define names."""
    defines = (
        ast.Import,
        ast.ImportFrom,
        ast.Assign,
        ast.AnnAssign,
        ast.FunctionDef,
        ast.AsyncFunctionDef,
        ast.ClassDef,
    )
    out = []
    for module, text in sources.items():
        for node in ast.parse(text).body:
            documents = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            guards = isinstance(node, ast.If) and any(
                n in ast.unparse(node.test) for n in ("TYPE_CHECKING", "__name__")
            )
            assigns = node.targets if isinstance(node, ast.Assign) else []
            elsewhere = any(not isinstance(t, ast.Name | ast.Tuple) for t in assigns)
            if elsewhere or not (documents or guards or isinstance(node, defines)):
                out.append(Violation(rule="import does work", where=module, why=f"line {node.lineno}"))
    return out


def vague_names(sources: Sources) -> list[Violation]:
    return [Violation(rule="name", where=m) for m in sources if VAGUE & {part.strip("_") for part in m.split(".")}]


def sizes(sources: Sources) -> list[Violation]:
    """Count lines of files, functions and classes, methods (dunders apart) and parameters (self and cls apart)."""
    out = []

    def count(rule: str, where: str, size: int) -> None:
        if size > LIMITS[rule]:
            out.append(Violation(rule=rule, where=where, size=size, why=f"{size} > {LIMITS[rule]}"))

    def visit(node: ast.AST, where: str) -> None:
        for child in ast.iter_child_nodes(node):
            inner = f"{where}.{child.name}" if hasattr(child, "name") else where
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                count("function", inner, child.end_lineno - child.lineno + 1)
                count("parameters", inner, num_parameters(child.args))
            if isinstance(child, ast.ClassDef):
                methods = [n.name for n in child.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
                count("class", inner, child.end_lineno - child.lineno + 1)
                count("methods", inner, len([m for m in methods if not (m.startswith("__") and m.endswith("__"))]))
            visit(child, inner)

    for module, text in sources.items():
        count("file", module, len(text.splitlines()))
        visit(ast.parse(text), module)
    return out


def num_parameters(args: ast.arguments) -> int:
    named = [a.arg for a in (*args.posonlyargs, *args.args)]
    if named[:1] in (["self"], ["cls"]):
        named = named[1:]
    return len(named) + len(args.kwonlyargs) + (args.vararg is not None) + (args.kwarg is not None)


RULES: list[Rule] = [
    upward_imports,
    circles,
    reads_of_environment,
    pickles,
    work_at_import,
    vague_names,
    sizes,
]


def judge(found: list[Violation], allowed: dict[tuple[str, str], int]) -> list[str]:
    """Return what is wrong: violations that are not allowed, and allowances that are not needed."""
    sizes_found = {(v.rule, v.where): v.size for v in found}
    wrong = [f"{v.rule}: {v.where} {v.why}" for v in found if v.size > allowed.get((v.rule, v.where), 0)]
    for key, size in allowed.items():
        if sizes_found.get(key, 0) < size:
            wrong.append(f"The allow-list lets {key} be {size}, but it is {sizes_found.get(key, 'fine')}: shrink it.")
    return wrong


def test_the_house_holds():
    sources = read_sources()
    assert len(sources) > 3, f"{SOURCE} holds no package"
    lengths = [len(text.splitlines()) for name, text in sources.items() if not name.endswith("__init__")]
    print(f"{len(sources)} files, median {statistics.median(lengths):g} lines, longest {max(lengths)}")
    wrong = judge([v for rule in RULES for v in rule(sources)], ALLOWED)
    assert not wrong, "\n".join(wrong)


def test_public_names():
    samestep = importlib.import_module(PACKAGE)
    assert sorted(PUBLIC) == PUBLIC
    assert sorted(samestep.__all__) == PUBLIC
    assert all(getattr(samestep, name) is not None for name in PUBLIC)


def planted(module: str, text: str) -> Sources:
    """A small lawful house with one more module."""
    house = {
        "__init__": "def __getattr__(name):\n    import samestep.settings\n",
        "errors": "import math\n",
        "data.__init__": "",
        "data.split": "from samestep.errors import E\n",
        "core.__init__": "",
        "core.tree": "from samestep.data.split import shard_bounds\nfrom ..units import words\n",
        "core.worker": "from . import tree\n",
        "units": "",
        "loop.run": "from samestep.core import tree\n",
        "launching.supervisor": "import os\nx = os.environ\n",
        "launching.payload": "import cloudpickle\n",
        "settings": "import samestep.loop.run\n",
    }
    return {f"{PACKAGE}.{name}": source for name, source in {**house, module: text}.items()}


def long_function(lines: int) -> str:
    return "def f():\n" + "    x = 1\n" * (lines - 1)


VIOLATIONS: dict[str, tuple[Rule, str, str]] = {
    "upward": (upward_imports, "core.fold", "import samestep.loop.run"),
    "upward, in a function": (upward_imports, "core.fold", "def f():\n    from samestep.loop import run"),
    "upward, relative": (upward_imports, "core.fold", "from ..loop import run"),
    "upward, relative module": (upward_imports, "core.fold", "from ..loop.run import Run"),
    "upward, by name": (
        upward_imports,
        "core.fold",
        "import importlib\nm = importlib.import_module('samestep.loop.run')",
    ),
    "upward, for types": (upward_imports, "core.fold", "if TYPE_CHECKING:\n    from samestep.loop.run import Run"),
    "core takes all of data": (upward_imports, "core.fold", "from samestep.data import shard_bounds"),
    "data takes core": (upward_imports, "data.source", "from samestep.core.tree import levels"),
    "launching takes more than a worker": (upward_imports, "launching.zygote", "import samestep.core.tree"),
    "a room takes the face": (upward_imports, "loop.step", "import samestep"),
    "the ground takes the ground": (upward_imports, "units", "import samestep.errors"),
    "unknown room": (upward_imports, "magic.wand", ""),
    "circle of two": (circles, "core.tree", "from samestep.core.worker import Worker"),
    "circle of one": (circles, "core.fold", "from samestep.core import fold"),
    "os.environ": (reads_of_environment, "core.fold", "import os\nx = os.environ['A']"),
    "os.getenv, renamed": (reads_of_environment, "core.fold", "import os as o\ndef f():\n    return o.getenv('A')"),
    "from os": (reads_of_environment, "core.fold", "from os import environ as e"),
    "pickle": (pickles, "core.fold", "def f():\n    import pickle"),
    "cloudpickle": (pickles, "launching.zygote", "from cloudpickle import dumps"),
    "torch.load": (pickles, "core.fold", "import torch\ndef f(p):\n    return torch.load(p)"),
    "object collectives": (pickles, "core.fold", "def f(x):\n    dist.all_gather_object(x, x)"),
    "allow_pickle": (pickles, "core.fold", "def f(p):\n    return np.load(p, allow_pickle=True)"),
    "call at import": (work_at_import, "core.fold", "import torch\ntorch.set_num_threads(1)"),
    "global setting at import": (work_at_import, "core.fold", "import torch\ntorch.backends.x = 1"),
    "loop at import": (work_at_import, "core.fold", "for x in range(3):\n    pass"),
    "vague name": (vague_names, "core.utils", ""),
    "long file": (sizes, "core.fold", "x = 1\n" * 601),
    "long function": (sizes, "core.fold", long_function(81)),
    "long class": (sizes, "core.fold", "class A:\n" + "    x = 1\n" * 300),
    "many methods": (sizes, "core.fold", "class A:\n" + "".join(f"    def _f{i}(self): ...\n" for i in range(16))),
    "many parameters": (sizes, "core.fold", "def f(a, b, /, c, d, *e, f, g, h, **i): ..."),
    "many parameters of a method": (sizes, "core.fold", "class A:\n    def f(self, a, b, c, d, e, f, g, h, i): ..."),
}


@pytest.mark.parametrize("name", VIOLATIONS)
def test_a_planted_violation_is_found(name):
    rule, module, text = VIOLATIONS[name]
    found = rule(planted(module, text))
    assert len(found) == 1, found
    assert f"{PACKAGE}.{module}" in found[0].where
    assert judge(found, {}) and not judge(found, {(found[0].rule, found[0].where): found[0].size})


LAWFUL = {
    "core.fold": "import math\nfrom samestep.core import tree\nfrom samestep.data import split\nimport samestep.errors",
    "data.proof": "'''Words.'''\nX: int = 1\nY, Z = 1, 2\n'''More words.'''\nfrom samestep.units import words",
    "loop.step": "from ..core.tree import a\nfrom . import run\nfrom ..data.split import b",
    "measure.cost": long_function(80) + "class A:\n" + "".join(f"    def f{i}(self): ...\n" for i in range(15))
    + "    def __len__(self): ...\n",
    "agree.stale": "class A:\n    def f(self, a, b, c, d, e, f, g, *, h): ...",
    "cli.__main__": "import os\nfrom samestep import settings\nif __name__ == '__main__':\n    print(os.environ)",
}  # fmt: skip


@pytest.mark.parametrize("module", LAWFUL)
def test_lawful_code_passes(module):
    assert not [v for rule in RULES for v in rule(planted(module, LAWFUL[module]))]


def test_the_allow_list_only_shrinks():
    key = ("file", "samestep.core.fold")
    found = sizes({"samestep.core.fold": "x = 1\n" * 610})
    assert not judge(found, {key: 610})
    assert judge(found, {key: 611}), "a larger allowance than needed"
    assert judge(found, {key: 609}), "grown beyond its allowance"
    assert judge([], {key: 610}), "an allowance that is not needed"
