"""A start or a resume under other conditions: refused in a few lines, until that kind is accepted; then noted."""

from __future__ import annotations

import re

import pytest
import torch
from playing import play
from refusing import made, refused, train
from zoo import Convolutional, Perceptron, classes_loss, vectors

from samestep.core.fakes import run_threads
from samestep.core.group import Solo
from samestep.core.randomness import seed_start
from samestep.errors import MismatchError, SettingsError
from samestep.loop.mismatch import environment_of
from samestep.loop.origin import Origin
from samestep.loop.recipe import ACCEPTABLE, Keeping, Recipe
from samestep.loop.run import Run
from samestep.loop.session import Session


def lines(text):
    """Lines of code, one letter each."""
    return b"".join(c.encode() * 4 + n.to_bytes(4, "little") for n, c in enumerate(text, 1) if c != "#")


def origin(text="abc", **environment):
    return Origin(script="train.py", code={"train.py": lines(text)}, environment=environment)


def main(run, data=None, make=Perceptron):
    model, _ = made(run, model=make)
    train(run, model, data=data, steps=4)


def facts_of(main, keeping, group=None, seed=0):
    seed_start(seed)
    session = Session(Recipe(replicas=4, seed=seed), keeping, group if group is not None else Solo())
    return session.finish(main(Run(session)))


def saved(folder, **keeping):
    """Return a checkpoint at half of `main`, written with this origin."""
    settings = {"origin": origin(MKL_CBWR="AUTO"), **keeping}
    facts = facts_of(main, Keeping(checkpoint=str(folder), every=2, **settings))
    return str(folder / "step-00000002"), facts


def resuming(path, **settings):
    return Keeping(resume=path, **{"origin": origin(MKL_CBWR="AUTO"), **settings})


def test_the_same_conditions_pass_in_silence(tmp_path):
    path, whole = saved(tmp_path)
    resumed = facts_of(main, resuming(path, origin=origin("a#bc", MKL_CBWR="AUTO")))
    assert resumed["weights_digest"] == whole["weights_digest"]
    assert len(resumed["notes"]) == 1, "only that it was resumed"


OTHER = {
    "environment": (origin(MKL_CBWR="AVX2"), ["environment there: MKL_CBWR AUTO$", "environment here: MKL_CBWR AVX2$"]),
    "unset": (origin(), ["environment there: MKL_CBWR AUTO$", "environment here: MKL_CBWR unset$"]),
    "code": (
        origin("axc", MKL_CBWR="AUTO"),
        [r"code there: train.py \(3 lines of code, only there line 2\)$", r"only here line 2\)$"],
    ),
    "renamed": (
        Origin(script="new.py", code={"new.py": lines("abcd")}, environment={"MKL_CBWR": "AUTO"}),
        [r"code there: train.py \(3 lines of code\)$", r"here: new.py \(4 lines of code, only here line 4\)$"],
    ),
}


@pytest.mark.parametrize("name", OTHER)
def test_one_kind_is_refused_and_can_be_accepted(name, tmp_path):
    kind = {"unset": "environment", "renamed": "code"}.get(name, name)
    path, whole = saved(tmp_path)
    other, words = OTHER[name]
    message = refused(MismatchError, [], main, keeping=resuming(path, origin=other))
    head, *rest = message.splitlines()
    assert path in head
    assert len(rest) == 3
    for word, line in zip(
        [*words, f'--accept {kind} \\(in launch\\(\\): accept=\\["{kind}"\\]\\)$'], rest, strict=True
    ):
        assert re.search(word, line), line
    for wrong in set(ACCEPTABLE) - {kind}:
        refused(
            MismatchError, [f"--accept .*{kind}", wrong], main, keeping=resuming(path, origin=other, accept=(wrong,))
        )
    accepted = facts_of(main, resuming(path, origin=other, accept=(kind,)))
    assert accepted["weights_digest"] == whole["weights_digest"]
    assert any(note.startswith(f"Accepted: other {kind}, there ") for note in accepted["notes"])


def test_code_and_environment_are_refused_together(tmp_path):
    path, _ = saved(tmp_path)
    other = origin("xbc", MKL_CBWR="AVX2")
    message = refused(MismatchError, [r"--accept code,environment \("], main, keeping=resuming(path, origin=other))
    assert len(message.splitlines()) == 6
    facts_of(main, resuming(path, origin=other, accept=("environment", "code")))


def test_an_imported_file_counts_where_both_have_it(tmp_path):
    def with_files(**files):
        code = {"train.py": lines("abc"), **{f"{name}.py": lines(text) for name, text in files.items()}}
        return Origin(script="train.py", code=code, environment={"MKL_CBWR": "AUTO"})

    path, _ = saved(tmp_path, origin=with_files(model="mm", unused="u"))
    facts_of(main, resuming(path, origin=with_files(model="mm", plots="p")))
    refused(MismatchError, [r"code here: model.py \("], main, keeping=resuming(path, origin=with_files(model="mn")))


@pytest.mark.parametrize(
    ("switch", "words"),
    [
        (torch.use_deterministic_algorithms, "deterministic algorithms on"),
        (
            lambda on: torch.set_float32_matmul_precision("high" if on else "highest"),
            "float32 precision high, matmul tf32",
        ),
        (
            lambda on: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16" if on else "none"),
            "float32 precision mixed, matmul bf16",
        ),
        (lambda on: setattr(torch.backends.mkldnn.conv, "fp32_precision", "bf16" if on else "none"), "conv bf16"),
        (lambda on: torch.backends.cuda.enable_flash_sdp(not on), "attention kernels mem_efficient math"),
        (lambda on: setattr(torch.backends.mkldnn, "enabled", not on), "mkldnn off"),
    ],
)
def test_switches_of_torch_are_environment(switch, words, tmp_path):
    path, _ = saved(tmp_path)
    switch(True)
    try:
        message = refused(MismatchError, ["--accept environment"], main, keeping=resuming(path))
        assert words in message.splitlines()[2]
    finally:
        switch(False)
    facts_of(main, resuming(path))


def test_versions_and_device_are_environment():
    found = environment_of("cpu")
    assert (found["torch"], found["device"]) == (torch.__version__, "cpu")
    assert found["CPU capability"] == torch.backends.cpu.get_cpu_capability()


def test_what_a_gpu_adds(monkeypatch):
    """All that can be read without one."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H1")
    found = environment_of("cuda:1")
    assert (found["device"], found["GPU"]) == ("cuda", "H1")
    torch.backends.cudnn.deterministic = True
    try:
        assert environment_of("cuda:1")["cuDNN switches"] != found["cuDNN switches"]
    finally:
        torch.backends.cudnn.deterministic = False


def changed(sample=0):
    x, y = (column.clone() for column in vectors())
    x[sample] += 1
    return x, y


def with_data(data):
    return lambda run: main(run, data=data)


def test_data_of_other_content(tmp_path):
    path, _ = saved(tmp_path)
    message = refused(
        MismatchError,
        [r"test_mismatch|refusing\.py:\d+", r"--accept data \("],
        with_data(changed()),
        keeping=resuming(path),
    )
    assert [line.split(":")[0] for line in message.splitlines()[1:3]] == ["  data there", "  data here"]
    refused(MismatchError, ["accept code,data"], with_data(changed()), keeping=resuming(path, accept=("code",)))
    notes = facts_of(with_data(changed()), resuming(path, accept=("data",)))["notes"]
    assert any(note.startswith("Accepted: other data") for note in notes)


class Read:
    """A data set of the user's, which draws."""

    def __init__(self, shift=0.0):
        self.shift = shift

    def __len__(self):
        return len(vectors()[0])

    def __getitem__(self, i):
        x, y = vectors()
        return x[i] + torch.rand(()) + self.shift, y[i]


def test_data_sets_of_the_users(tmp_path):
    whole = facts_of(with_data(Read()), Keeping(checkpoint=str(tmp_path), every=2))
    path = str(tmp_path / "step-00000002")
    assert facts_of(with_data(Read()), Keeping(resume=path))["weights_digest"] == whole["weights_digest"]
    refused(MismatchError, ["--accept data"], with_data(Read(0.5)), keeping=Keeping(resume=path))


def test_what_was_accepted_is_kept(tmp_path):
    """The checkpoints that follow are of the new conditions; what was accepted is asked once, and told to the end."""
    first, _ = saved(tmp_path / "a")
    other = origin("xbc", MKL_CBWR="AUTO")
    keeping = Keeping(resume=first, checkpoint=str(tmp_path / "b"), every=1, origin=other, accept=("code", "data"))
    facts_of(with_data(changed()), keeping)
    second = str(tmp_path / "b" / "step-00000003")
    notes = facts_of(with_data(changed()), resuming(second, origin=other))["notes"]
    assert [note.split(",")[0] for note in notes[:2]] == ["Accepted: other code", "Accepted: other data"]
    refused(MismatchError, ["--accept data"], with_data(changed(7)), keeping=resuming(second, origin=other))
    refused(MismatchError, ["--accept code"], with_data(changed()), keeping=resuming(second))


def test_what_cannot_be_accepted(tmp_path):
    path, _ = saved(tmp_path)
    keeping = resuming(path, accept=ACCEPTABLE)
    fewer = tuple(column[:40] for column in vectors())
    refused(MismatchError, ["samples=.* there and 40 here", r"run\.load"], with_data(fewer), keeping=keeping)
    refused(MismatchError, ["seed=0 there and 1 here"], main, keeping=keeping, seed=1)
    refused(MismatchError, ["float32", "float64"], lambda run: main(run, make=double), keeping=keeping)
    refused(
        MismatchError,
        ["another model"],
        lambda run: made(run, model=Convolutional) and train_images(run),
        keeping=keeping,
    )


def double():
    class Wide(Perceptron):
        def forward(self, x):
            return super().forward(x.double())

    return Wide().double()


def train_images(run):
    for step in run.steps(vectors(), batch_size=19, steps=4):
        for _ in step:
            step.backward(sum(p.sum() for p in run.model.trained[0].weights.parameters))
        step.update()


def played_apart(keepings, main=main, seeds=None):
    """Play on as many workers as there are keepings, each with its own; return their facts."""

    def one(group):
        rank = group.worker.rank
        body = main[rank] if isinstance(main, list) else main
        return facts_of(body, keepings[rank], group, seeds[rank] if seeds else 0)

    return run_threads(one, len(keepings))


def test_workers_under_other_conditions():
    alike, other = origin(MKL_CBWR="AUTO"), origin("abx", MKL_CBWR="AVX2")
    played_apart([Keeping(origin=alike)] * 3)
    with pytest.raises(MismatchError) as caught:
        played_apart([Keeping(origin=alike), Keeping(origin=alike), Keeping(origin=other)])
    head, *rest = str(caught.value).splitlines()
    assert head.startswith("Workers 0 and 2 differ")
    assert rest[2:4] == ["  environment of worker 0: MKL_CBWR AUTO", "  environment of worker 2: MKL_CBWR AVX2"]
    assert [line.split()[:4] for line in rest[:2]] == [["code", "of", "worker", f"{rank}:"] for rank in (0, 2)]
    assert "--accept code,environment (" in rest[4]
    both = ("code", "environment")
    facts = played_apart([Keeping(origin=alike, accept=both), Keeping(origin=other, accept=both)])[0]
    assert [note.split(",")[0] for note in facts["notes"]] == ["Accepted: other code", "Accepted: other environment"]


def test_workers_with_other_recipes():
    with pytest.raises(MismatchError, match=r"Workers 0 and 1 have different recipes: seed=0 and seed=7\."):
        played_apart([Keeping(accept=ACCEPTABLE)] * 2, seeds=[0, 7])


def test_workers_with_other_data():
    mains = [with_data(vectors()), with_data(changed())]
    with pytest.raises(MismatchError, match=r"(?s)other data.*data of worker \d: .*--accept data"):
        played_apart([Keeping()] * 2, mains)
    played_apart([Keeping(accept=("data",))] * 2, mains)
    fewer = with_data(tuple(column[:40] for column in vectors()))
    with pytest.raises(MismatchError, match=r"samples=\d+ against samples=\d+"):
        played_apart([Keeping(accept=ACCEPTABLE)] * 2, [main, fewer])


def test_words_that_are_no_kind():
    with pytest.raises(SettingsError, match=r"accept='model'.*--accept code,environment,data"):
        Keeping(accept=("code", "model"))


def test_the_fingerprint_does_not_change_a_run(monkeypatch):
    def augmented(run):
        model, _ = made(run)
        told = []
        for step in run.steps(Read(), batch_size=19, epochs=2):
            for batch in step:
                step.backward(classes_loss(model, batch))
            step.update()
            told.append([step.loss, float(torch.rand(()))])
        return told

    with_it = [play(augmented, 4, workers).as_words() for workers in (1, 2)]
    monkeypatch.setattr("samestep.loop.feed.fingerprint", lambda *_: [])
    assert with_it == [play(augmented, 4, 1).as_words()] * 2
