"""What must be the same for the same bits: compared between the workers of a run, and with a checkpoint it resumes.

    recipe, model, length of the data, batch size    a difference is refused
    code, environment, content of the data           a difference is refused, until the user accepts that kind

What was accepted is noted, and kept in the checkpoints that follow.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from samestep.core.calls import Calls, line_of_user
from samestep.core.device import is_cuda
from samestep.data.fingerprint import agree
from samestep.errors import MismatchError
from samestep.loop.origin import changed_lines, digests_of
from samestep.loop.recipe import ACCEPTABLE, Keeping, Recipe
from samestep.storage.checkpoint import Checkpoint

_SELECTING = (
    *("avx2", "avx_vnni", "avx512_f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_bf16", "amx_int8", "amx_fp16"),
    *("neon", "fp16_arith", "bf16", "i8mm", "dot", "sve", "sve2", "sve_bf16", "sve_max_length", "sme"),
)
"""CPU instructions by which torch and its libraries choose kernels."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One kind of thing that differs.

    Attributes:
        kind: one of `ACCEPTABLE`.
        there, here: what it is in each place, in words.
    """

    kind: str
    there: str
    here: str


class Conditions:
    """What a worker's results hang on beside its settings, and which differences its user accepts.

    Attributes:
        environment: what changes bits, name -> value; read by `begin`.
    """

    def __init__(self, recipe: Recipe, keeping: Keeping, device: str, note: Callable[[str], None]):
        """Take what to compare.

        Args:
            recipe: may not differ.
            keeping: where the run comes from, and what is accepted.
            device: of this worker.
            note: takes a sentence for the summary.
        """
        self.environment: dict[str, str] = {}
        self._recipe = recipe
        self._origin = keeping.origin
        self._accept = keeping.accept
        self._device = device
        self._note = note
        self._accepted: list[str] = []
        self._accepted_data: list[Any] = []

    def begin(self, calls: Calls) -> None:
        """Read the environment as it is now, and compare the workers. Collective.

        Raises:
            MismatchError: a worker has another recipe, other code or another environment than the first.
        """
        self.environment = {**environment_of(self._device), **self._origin.environment}
        texts = {name: digest_of(lines) for name, lines in self._origin.code.items()}
        mine = {"recipe": self._recipe.as_facts(), "code": texts, "environment": self.environment}
        (first, _), *others = calls.meet("run.replicate", line_of_user(), mine)
        for rank, (facts, _) in enumerate(others, 1):
            where = ("of worker 0", f"of worker {rank}")
            recipes = _other_values(first["recipe"], facts["recipe"])
            if recipes:
                there, here = (_listed(recipes, side, "=") for side in (0, 1))
                raise MismatchError(
                    f"Workers 0 and {rank} have different recipes: {there} and {here}. Give every worker the same "
                    f"settings."
                )
            found = [_environments(first["environment"], facts["environment"])]
            files = [name for name, digest in texts_in_both(first["code"], facts["code"]) if digest[0] != digest[1]]
            if files:
                there, here = (", ".join(f"{name} {f['code'][name][:8]}" for name in files) for f in (first, facts))
                found.insert(0, Difference(kind="code", there=there, here=here))
            self._judge(f"Workers 0 and {rank} differ, so their results may.", where, found)

    def facts(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of this."""
        return {
            "recipe": self._recipe.as_facts(),
            "environment": self.environment,
            "code": {"script": self._origin.script, "files": dict(self._origin.code)},
            "accepted": {"notes": self._accepted, "data": self._accepted_data},
        }

    def resume(self, saved: Checkpoint) -> None:
        """Compare with what a checkpoint keeps.

        Raises:
            MismatchError: it is of another recipe, or of other code or another environment, and that is not accepted.
        """
        recipes = _other_values(saved.facts["recipe"], self._recipe.as_facts())
        if recipes:
            words = ", ".join(f"{name}={there!r} there and {here!r} here" for name, (there, here) in recipes.items())
            raise MismatchError(
                f"The checkpoint {saved.path} was made with another recipe: {words}. Results would change. "
                f"Use the same settings, or start anew in another folder."
            )
        earlier = saved.facts["accepted"]
        self._accepted = list(earlier["notes"])
        self._accepted_data = list(earlier["data"])
        for words in self._accepted:
            self._note(words)
        found = [self._codes(saved.facts["code"]), _environments(saved.facts["environment"], self.environment)]
        head = f"The checkpoint {saved.path} was made under other conditions, so results may change."
        self._judge(head, ("there", "here"), found)

    def check_worker_data(self, rank: int, theirs: dict[str, Any], mine: dict[str, Any]) -> None:
        """Compare what another worker gave to `run.steps` with what this one did.

        Args:
            rank: of the other worker.
            theirs, mine: samples, batch_size, ..., and content: a fingerprint.

        Raises:
            MismatchError: they differ; of the content only where that is not accepted.
        """
        facts = _other_values({**theirs, "content": None}, {**mine, "content": None})
        if facts:
            there, here = (_listed(facts, side, "=") for side in (0, 1))
            raise MismatchError(
                f"Worker {rank} was given other data than this one: {there} against {here}. "
                f"Make the data alike on every worker: sort what comes from folders and sets."
            )
        found = _contents(theirs, mine)
        head = f"Worker {rank} was given other data than this one. Sort what comes from folders and sets."
        self._judge(head, (f"of worker {rank}", "here"), [found])

    def check_recorded_data(self, there: dict[str, Any], here: dict[str, Any]) -> None:
        """Compare what is given to `run.steps` with what was given when the call was recorded.

        Args:
            there, here: samples, batch_size, ..., and content: a fingerprint.

        Raises:
            MismatchError: they differ; of the content only where that is not accepted.
        """
        facts = _other_values({**there, "content": None}, {**here, "content": None})
        if facts:
            words = ", ".join(f"{name}={was!r} there and {now!r} here" for name, (was, now) in facts.items())
            raise MismatchError(
                f"The checkpoint's run had other data at this call of run.steps: {words}. The steps that were made "
                f"cannot be told again with it. Use the same data and batch size; or start anew in another folder, "
                f"with the weights: run.load(checkpoint)."
            )
        found = _contents(there, here)
        if found is None or any(here["content"] == known for known in self._accepted_data):
            return
        head = f"The checkpoint's run had data of other content at {line_of_user()}."
        self._judge(head, ("there", "here"), [found])
        self._accepted_data.append(here["content"])

    def _codes(self, saved: dict[str, Any]) -> Difference | None:
        """Compare the script with the script, and other files that both imported by name."""
        if not saved["script"] or not self._origin.script:
            return None
        pairs = {(saved["script"], self._origin.script)}
        pairs |= {(name, name) for name in saved["files"] if name in self._origin.code and name != saved["script"]}
        there, here = [], []
        for old, new in sorted(pairs):
            before, now = saved["files"][old], self._origin.code[new]
            if digests_of(before) != digests_of(now):
                words = changed_lines(before, now)
                there.append(f"{old} ({words[0]})")
                here.append(f"{new} ({words[1]})")
        return Difference(kind="code", there=", ".join(there), here=", ".join(here)) if there else None

    def _judge(self, head: str, places: tuple[str, str], found: Sequence[Difference | None]) -> None:
        """Note differences that are accepted; refuse if there are others.

        Raises:
            MismatchError: two lines for each kind, and one with the flag that accepts all of them.
        """
        differing = [one for one in found if one is not None]
        refused = [one for one in differing if one.kind not in self._accept]
        if refused:
            lines = [
                f"  {d.kind} {place}: {w}" for d in refused for place, w in zip(places, (d.there, d.here), strict=True)
            ]
            kinds = [kind for kind in ACCEPTABLE if kind in self._accept or kind in [d.kind for d in refused]]
            quoted = ", ".join(f'"{kind}"' for kind in kinds)
            flag = f"--accept {','.join(kinds)}"
            lines.append(f"  To go on all the same: {flag} (in launch(): accept=[{quoted}])")
            raise MismatchError("\n".join([head, *lines]))
        for d in differing:
            words = f"Accepted: other {d.kind}, {places[0]} {d.there}; {places[1]} {d.here}."
            if words not in self._accepted:
                self._accepted.append(words)
                self._note(words)


def environment_of(device: str) -> dict[str, str]:
    """Return what changes bits besides the recipe, as torch tells it: versions, instructions, switches."""
    found = {
        "torch": str(torch.__version__),
        "device": torch.device(device).type,
        "CPU capability": torch.backends.cpu.get_cpu_capability(),
        "CPU instructions": _cpu_instructions(),
        "mkldnn": _switch(torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)),
        "float32 precision": _precision(),
        "deterministic algorithms": _switch(torch.are_deterministic_algorithms_enabled()),
        "attention kernels": " ".join(
            name for name in ("flash", "mem_efficient", "math") if getattr(torch.backends.cuda, f"{name}_sdp_enabled")()
        ),
    }
    return {**found, **_gpu()} if is_cuda(device) else found


def digest_of(lines: bytes) -> str:
    """Return a digest of lines of code, whatever their numbers."""
    return hashlib.sha256(b"".join(digests_of(lines))).hexdigest()[:16]


def texts_in_both(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[tuple[str, tuple[Any, Any]]]:
    """Return name and both values of each text that both hold: what else is imported says nothing."""
    return [(name, (first[name], second[name])) for name in first if name in second]


def _cpu_instructions() -> str:
    found: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    names = [f"{name}={found[name]}" if found[name] is not True else name for name in _SELECTING if found.get(name)]
    return " ".join([str(found.get("architecture", "")), *names]).strip()


def _precision() -> str:
    """Return how float32 is multiplied; torch refuses an overall word where its older and newer settings are mixed."""
    try:
        overall = torch.get_float32_matmul_precision()
    except RuntimeError:
        overall = "mixed"
    # The type checker does not know these modules' attributes.
    mkldnn: Any = torch.backends.mkldnn
    return f"{overall}, matmul {_exact(mkldnn.matmul)}, conv {_exact(mkldnn.conv)}"


def _exact(operation: Any) -> str:
    # "none" is what nobody has set, and computes like "ieee".
    return str(operation.fp32_precision).replace("none", "ieee")


def _gpu() -> dict[str, str]:
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    return {
        "GPU": torch.cuda.get_device_name(),
        "CUDA": str(torch.version.cuda),
        "cuDNN": str(cudnn.version()),
        "cuDNN switches": f"enabled={cudnn.enabled} deterministic={cudnn.deterministic} benchmark={cudnn.benchmark}",
        "GPU precision": f"matmul {_exact(matmul)}, conv {cudnn.conv.fp32_precision}, rnn {cudnn.rnn.fp32_precision}",
        "reduced reductions": f"fp16={matmul.allow_fp16_reduced_precision_reduction} "
        f"bf16={matmul.allow_bf16_reduced_precision_reduction}",
    }


def _switch(is_on: bool) -> str:
    return "on" if is_on else "off"


def _other_values(there: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return both values of every name in `here` that has another one `there`."""
    return {name: (there.get(name), here[name]) for name in here if there.get(name) != here[name]}


def _listed(values: Mapping[str, tuple[Any, Any]], side: int, sign: str) -> str:
    return ", ".join(f"{name}{sign}{pair[side]}" for name, pair in values.items())


def _environments(there: Mapping[str, str], here: Mapping[str, str]) -> Difference | None:
    names = dict.fromkeys([*here, *there])
    values = _other_values({n: there.get(n, "unset") for n in names}, {n: here.get(n, "unset") for n in names})
    if not values:
        return None
    return Difference(kind="environment", there=_listed(values, 0, " "), here=_listed(values, 1, " "))


def _contents(there: dict[str, Any], here: dict[str, Any]) -> Difference | None:
    before, now = there["content"], here["content"]
    if agree(before, now):
        return None
    number = next(i for i, pair in enumerate(zip(before, now, strict=False)) if pair[0] != pair[1])
    words = [
        f"{facts['samples']} samples, content {digests[number][:8]}"
        for facts, digests in ((there, before), (here, now))
    ]
    return Difference(kind="data", there=words[0], here=words[1])
