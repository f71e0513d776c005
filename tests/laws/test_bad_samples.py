"""The law: samples that cannot be read are left out alike by any number of workers, told, recorded, and no others."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from playing import assert_same_bits, play, replaced
from refusing import made, refused
from test_resume import assert_resumed_is_never_stopped
from zoo import Convolutional, Perceptron, classes_loss, images, vectors

import samestep.agree.allowance as allowance
import samestep.agree.meeting as meeting
import samestep.agree.synchronous as synchronous
import samestep.data.proof as proof_module
import samestep.data.shard as shard_module
import samestep.data.source as source_module
import samestep.loop.feed as feed_module
import samestep.loop.step as step_module
from samestep.core.group import Solo
from samestep.core.randomness import seed_start
from samestep.data.proof import Coverage, LeftOut, Proof, SampleCount
from samestep.data.source import Source
from samestep.data.split import Slice
from samestep.errors import DataError, MismatchError, SamestepError, SettingsError
from samestep.loop.recipe import Keeping, Recipe
from samestep.loop.run import Run
from samestep.loop.session import Session

BAD = (3, 17, 18, 40)
FLEETS = [(8, 1), (8, 2), (8, 3), (8, 8), (5, 1), (5, 2), (1, 1)]


class Samples:
    """Rows of columns; some cannot be read, and each reading draws from the global generators."""

    def __init__(self, columns, bad=BAD, error=ValueError):
        self.columns, self.bad, self.error = columns, bad, error

    def __len__(self):
        return len(self.columns[0])

    def __getitem__(self, sample):
        drawn = torch.rand(())
        if sample in self.bad:
            raise self.error(f"broken file {sample}")
        return (*(column[sample] for column in self.columns), sample, drawn)


class Together(Samples):
    """Reads a shard at once."""

    def __getitems__(self, samples):
        return [self[sample] for sample in samples]


def training(
    run, *, data=None, rule: Any = "skip", batch_size=19, epochs=2, loaders=0, choices=None, collate=None
) -> Any:
    """Train, and tell all that a script can see."""
    model = Convolutional()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    run.replicate(model, optimizer, on_bad_sample=rule)
    told = []
    data = data if data is not None else Samples(images())
    for step in run.steps(data, batch_size=batch_size, epochs=epochs, loaders=loaders, collate=collate):
        for x, y, _, drawn in step:
            step.backward(classes_loss(model, (x, y)))
            step.mean(drawn=drawn.double().mean())
        step.update(**(choices or {}))
        told.append([step.number, step.size, step.loss, step.means, step.bad_samples, step.skipped])
        told.append([run.digest(), float(torch.rand(()))])
    return told


def same_bits_with_bad_samples(folder) -> None:
    """The law, as the planted faults hold it."""
    played = assert_same_bits(training, [(8, 1), (8, 3)])
    assert sum(len(entry[4]) for entry in played.result[::2]) == 2 * len(BAD)


def test_left_out_alike():
    played = assert_same_bits(training, FLEETS)
    left_out = [sample for entry in played.result[::2] for sample in entry[4]]
    assert sorted(left_out) == sorted(BAD * 2)
    assert {entry[4].get(17, "") for entry in played.result[::2]} == {"", "ValueError: broken file 17"}


@pytest.mark.parametrize(
    "settings",
    [
        {"choices": {"clip_norm": 0.5}},
        {"choices": {"transform": lambda name, g: g + 0.01 * torch.randn_like(g)}},
        {"batch_size": 3},  # shards of one sample: some become empty
        {"rule": 4},
        {"data": Together(images())},
        {"data": Samples(images(), error=OSError)},
    ],
    ids=["clipped", "transformed", "shards become empty", "budget", "together", "OSError"],
)
def test_left_out_alike_with(settings):
    assert_same_bits(partial(training, **settings), [(8, 1), (8, 3), (1, 1)])


@pytest.mark.parametrize("kind", [Samples, Together])
def test_loaders_change_nothing(kind):
    inline, ahead = (play(partial(training, data=kind(images()), loaders=loaders), 4, 1) for loaders in (0, 2))
    assert inline.as_words() == ahead.as_words()


def test_nothing_changes_where_all_can_be_read():
    stop, skip = (play(partial(training, data=Samples(images(), ()), rule=rule), 4, 2) for rule in ("stop", "skip"))
    assert stop.as_words() == skip.as_words()


def is_the_mean_over_what_was_read(folder) -> None:
    """The law: the update is that of a plain loop, given batches without the bad samples."""
    x, y = vectors()

    def make():
        model = Perceptron().double()
        return model, torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)

    def ours(run):
        model, optimizer = make()
        run.replicate(model, optimizer, on_bad_sample="skip")
        told = []
        for step in run.steps(Samples((x.double(), y)), batch_size=13, epochs=2, shuffle=False):
            for a, b, *_ in step:
                step.backward(classes_loss(model, (a, b)))
                step.mean(labels=b.double().mean())
            step.update()
            told.append((step.loss, step.means["labels"]))
        return told, [p.detach().clone() for p in model.parameters()]

    def plain():
        seed_start(0)
        model, optimizer = make()
        told = []
        for _, start in itertools.product(range(2), range(0, len(x), 13)):
            good = [i for i in range(start, min(start + 13, len(x))) if i not in BAD]
            loss = classes_loss(model, (x[good].double(), y[good]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            told.append((float(loss.detach()), float(y[good].double().mean())))
        return told, [p.detach().clone() for p in model.parameters()]

    (told, weights), (told_plainly, plain_weights) = play(ours, 4, 2).result, plain()
    assert np.allclose(told, told_plainly, rtol=1e-12)
    assert all(torch.allclose(a, b, rtol=1e-11) for a, b in zip(weights, plain_weights, strict=True))


def test_is_the_mean_over_what_was_read(tmp_path):
    is_the_mean_over_what_was_read(tmp_path)


def counting(run) -> Any:
    """Counts items itself: twice as many for each sample, so the means are as without."""
    model = Perceptron()
    run.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1), on_bad_sample="skip")
    told = []
    for step in run.steps(Samples(vectors()), batch_size=16, epochs=1):
        for x, y, *_ in step:
            step.backward(classes_loss(model, (x, y)), count=2 * len(x))
        step.update()
        told.append(step.loss)
    return told


def test_counted_items_are_those_that_were_read():
    counted = assert_same_bits(counting, [(8, 1), (8, 3)])

    def uncounted(run):
        with replaced(step_module.Step, "backward", _without_count(step_module.Step.backward)):
            return counting(run)

    assert np.allclose(counted.result, play(uncounted, 8, 1).result, rtol=1e-6)


def _without_count(backward):
    return lambda step, loss, count: backward(step, loss)


def scaled(run) -> Any:
    """Whole batches are bad, under a scaler and with buffers."""
    model = Convolutional()
    optimizer, scaler = torch.optim.AdamW(model.parameters(), lr=3e-3), torch.amp.GradScaler("cpu", growth_interval=3)
    run.replicate(model, optimizer, scaler, on_bad_sample="skip")
    told = []
    data = Samples(images(), bad=(2, 4, 5, 6, 7, 12))
    for step in run.steps(data, batch_size=4, epochs=1, shuffle=False):
        before, scale = run.digest(), scaler.get_scale()
        for x, y, *_ in step:
            step.backward(scaler.scale(classes_loss(model, (x, y))))
            step.mean(read=len(x))
        step.update(scaler=scaler, clip_norm=1.0)
        assert step.skipped == (step.number == 1) == math.isnan(step.loss)
        assert step.skipped == (before == run.digest()) == ("read" not in step.means)
        assert not step.skipped or (scaler.get_scale() == scale and math.isnan(step.grad_norm))
        told.append([step.loss, step.means, step.skipped, scaler.get_scale()])
    assert len({entry[3] for entry in told}) > 1
    return told


def test_a_batch_without_a_good_sample_makes_no_update():
    played = assert_same_bits(scaled, [(8, 1), (8, 3), (5, 2)])
    assert [entry[2] for entry in played.result][:4] == [False, True, False, False]


def test_a_batch_without_a_good_sample_is_not_one_more_in_a_row():
    """`nonfinite` counts updates that were not finite: neither more nor fewer of them for an empty batch between."""

    def main(run, last=None):
        model = Perceptron()
        run.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1), on_bad_sample="skip", nonfinite=2)
        for step in run.steps(Samples(vectors(), bad=(4, 5, 6, 7)), batch_size=4, steps=5, shuffle=False):
            for x, y, *_ in step:
                step.backward(classes_loss(model, (x, y)) * (math.nan if step.number in (0, 2, last) else 1))
            step.update()

    play(main, 4, 2)
    refused(ArithmeticError, ["step 3, ", "2 updates in a row"], partial(main, last=3))


def adversarial(run) -> Any:
    """Two updates a step, of which the first is kept in a checkpoint of its own."""
    first, second = Perceptron(), Perceptron()
    optimizers = [torch.optim.Adam(model.parameters(), lr=1e-3) for model in (first, second)]
    run.replicate(first, second, *optimizers, on_bad_sample="skip")
    told = []
    for step in run.steps(Samples(vectors()), batch_size=19, epochs=2):
        for model, optimizer in zip((first, second), optimizers, strict=True):
            for x, y, *_ in step:
                step.backward(classes_loss(model, (x, y)))
            step.update(optimizer)
            told.append([step.loss, step.bad_samples])
        run.once(lambda: 1)
    return told


def test_resumed_across_bad_samples(tmp_path):
    assert_resumed_is_never_stopped(training, tmp_path / "a", 5, [2, 1, 3])
    assert_resumed_is_never_stopped(adversarial, tmp_path / "b", 4, [1, 3])


def test_badness_that_changes_between_two_updates_of_a_step_is_an_error(tmp_path):
    data = Samples(vectors())

    def main(run):
        models = [Perceptron(), Perceptron()]
        optimizers = [torch.optim.Adam(model.parameters()) for model in models]
        run.replicate(*models, *optimizers, on_bad_sample="skip")
        for step in run.steps(data, batch_size=30, steps=2, shuffle=False):
            for model, optimizer in zip(models, optimizers, strict=True):
                for x, y, *_ in step:
                    step.backward(classes_loss(model, (x, y)))
                step.update(optimizer)
                if optimizer is optimizers[0]:
                    run.save(str(tmp_path / f"{step.number}"))

    play(main, 4, 2)
    path = str(next((tmp_path / "0").glob("step-*")))
    play(main, 4, 1, keeping=Keeping(resume=path))
    data.bad = (3, 18, 40)
    with pytest.raises(DataError, match=r"\[17\] could be read for one update of step 0, and not for another"):
        play(main, 4, 1, keeping=Keeping(resume=path))
    data.bad = (3, 5, 17, 18, 40)
    with pytest.raises(DataError, match=r"\[5\] could be read"):
        play(main, 4, 1, keeping=Keeping(resume=path))


def test_the_budget_counts_each_sample_once(tmp_path):
    budget_counts_each_once(tmp_path)


def budget_counts_each_once(folder) -> None:
    assert play(partial(training, rule=4, epochs=3), 4, 2).exactly_once
    words = [r"4 samples of your data could not be read", r"on_bad_sample=3", r"sample \d+: ValueError: broken file"]
    message = refused(DataError, [*words, "on_bad_sample=8"], partial(training, rule=3))
    assert message.count("broken file") == 3


def test_the_budget_goes_on_after_a_resume(tmp_path):
    keeping = Keeping(checkpoint=str(tmp_path), every=1, keep=1000)
    ordered = partial(training, batch_size=10, epochs=1)
    with pytest.raises(DataError, match="4 samples of your data"):
        play(partial(ordered, rule=3), 4, 2, keeping=keeping)
    found = sorted(tmp_path.glob("step-*"))
    assert len(found) > 1
    for path in found:
        with pytest.raises(DataError, match="4 samples of your data"):
            play(partial(ordered, rule=3), 4, 1, keeping=Keeping(resume=str(path)))
        expected = play(partial(ordered, rule="skip"), 4, 1)
        resumed = play(partial(ordered, rule="skip"), 4, 1, keeping=Keeping(resume=str(path)))
        assert resumed.as_words() == expected.as_words()


def test_resumed_under_a_rule_that_does_not_skip(tmp_path):
    play(partial(training, rule="skip"), 4, 2, keeping=Keeping(checkpoint=str(tmp_path)))
    for rule in ("stop", 1):
        words = rf"left out bad samples.*ValueError: broken file.*on_bad_sample={rule!r}"
        with pytest.raises(MismatchError, match=words):
            play(partial(training, rule=rule), 4, 1, keeping=Keeping(resume=str(tmp_path)))


def test_workers_with_other_rules_are_found():
    def main(run):
        training(run, rule="skip" if run.worker.is_first else 9, data=Samples(images(), ()))

    refused(MismatchError, ["other on_bad_sample"], main, workers=[2])


@pytest.mark.parametrize("rule", [0, -1, True, None, "ignore", 1.5])
def test_impossible_rules_are_refused(rule):
    refused(SettingsError, ["on_bad_sample=", "'skip'"], partial(training, rule=rule))


def test_the_run_stops_unless_told():
    def main(run):
        model, _ = made(run)
        for step in run.steps(Samples(vectors()), batch_size=19, epochs=1):
            for x, y, *_ in step:
                step.backward(classes_loss(model, (x, y)))
            step.update()

    refused(DataError, [r"Sample \d+ of your data \(Samples\) failed: ValueError: broken file"], main)


class Flaky(Samples):
    """Each bad sample fails the first `times` times it is asked for."""

    def __init__(self, columns, times):
        super().__init__(columns)
        self.times, self.tries = times, dict.fromkeys(BAD, 0)

    def __getitem__(self, sample):
        if sample in self.tries:
            self.tries[sample] += 1
            if self.tries[sample] <= self.times:
                raise OSError(f"try again {sample}")
        return (*(column[sample] for column in self.columns), sample, torch.rand(()))


def test_what_fails_for_a_moment_is_read_again(tmp_path):
    reading_again_mends(tmp_path)


def reading_again_mends(folder) -> None:
    """Same bits as if nothing had failed: a sample is bad where two tries in a row, alone, fail."""
    steady, flaky, worse = (play(partial(training, data=Flaky(images(), times), epochs=1), 4, 1) for times in (0, 1, 3))
    assert steady.as_words() == flaky.as_words()
    left_out = [sample for entry in worse.result[::2] for sample in entry[4]]
    assert sorted(left_out) == sorted(BAD)


def test_memory_that_runs_out_is_no_bad_sample():
    words = [r"Sample \d+ of your data \(Samples\) failed: MemoryError"]
    refused(DataError, words, partial(training, data=Samples(images(), error=MemoryError)))


def test_a_collate_function_that_fails_is_no_bad_sample():
    def collate(samples):
        raise KeyError("label")

    refused(DataError, ["Collating samples .*KeyError.*mend the collate"], partial(training, collate=collate))


@pytest.mark.parametrize("kind", ["mean", "gather"])
def test_evaluations_stop(kind):
    def main(run):
        made(run, on_bad_sample="skip")
        getattr(run, kind)(lambda batch: batch[1], Samples(vectors()), batch_size=7)

    refused(DataError, ["Sample 3 of your data"], main)


class Hundreds(Source):
    """A source of a user's own."""

    num_samples = 100

    def fetch(self, ids, seed, epoch, seed_sample):
        if 17 in ids.tolist():
            raise LookupError("no 17")
        return torch.from_numpy(ids).float()[:, None]


@pytest.mark.parametrize("loaders", [0, 1])
def test_sources_of_ones_own(loaders):
    def main(run):
        model = torch.nn.Linear(1, 1)
        run.replicate(model, torch.optim.SGD(model.parameters(), lr=1e-6), on_bad_sample=1)
        told = {}
        for step in run.steps(Hundreds(), batch_size=30, epochs=1, loaders=loaders):
            for x in step:
                step.backward(model(x).square().mean())
            step.update()
            told |= step.bad_samples
        return told

    played = assert_same_bits(main, [(4, 1)]) if loaders else assert_same_bits(main, [(4, 1), (4, 3)])
    assert played.result == {17: "LookupError: no 17"}


def test_errors_are_told_on_one_short_line():
    class Wordy(Samples):
        def __getitem__(self, sample):
            if sample in self.bad:
                raise ValueError("a\n  b\udcff" + "c" * 1000)
            return super().__getitem__(sample)

    played = play(partial(training, data=Wordy(images())), 4, 2)
    (error,) = {error for entry in played.result[::2] for error in entry[4].values()}
    assert error == f"ValueError: a b\\udcff{'c' * 200}"[:200] + " ..."


def finished(main) -> dict[str, Any]:
    session = Session(Recipe(replicas=4), Keeping(), Solo())
    return session.finish(main(Run(session)))


def test_the_summary_names_what_was_skipped():
    facts = finished(partial(training, data=Samples(images(), bad=range(1, 8))))
    notes, num = facts["notes"], len(images()[0])
    first, second, third = (f"sample {s}: ValueError: broken file {s}" for s in (note.split()[1] for note in notes[:3]))
    assert facts["samples_exactly_once"]
    assert facts["samples_sentence"] == (
        f"{num - 7} of {num} samples exactly once per epoch, 2 epochs; "
        f"7 skipped ({first}; {second}; {third}; and 4 more)"
    )
    assert len(notes) == 5
    assert "and was skipped: ValueError: broken file" in notes[0]
    assert notes[4].endswith("Further ones are skipped silently.")


def test_a_sample_is_told_once():
    """However many epochs leave it out."""
    notes = finished(training)["notes"]
    assert sorted(int(note.split()[1]) for note in notes) == sorted(BAD)


def test_the_proof_fails_where_a_sample_is_missing_and_was_not_declared_bad(tmp_path):
    proof_needs_declarations(tmp_path)


def proof_needs_declarations(folder) -> None:
    """The law: declared bad and not read, or read and not declared bad; nothing else."""

    def proof(read, bad):
        coverage, left_out = Coverage(10), LeftOut()
        coverage.add(Slice(0, 0, 0, 10, True))
        left_out.add(0, [(sample, "ValueError: broken") for sample in bad])
        return Proof.of(coverage, SampleCount.of(0, np.array(read, dtype=np.int64)), lambda epoch: None, left_out)

    everything = [*range(10)]
    without = [i for i in everything if i != 7]
    assert proof(everything, []).holds
    assert proof(without, [7]).holds
    assert proof(without, [7]).in_words() == (
        "9 of 10 samples exactly once per epoch, 1 epoch; 1 skipped (sample 7: ValueError: broken)"
    )
    for read, bad in [(without, []), (everything, [7]), (without, [6]), (without[1:], [7]), ([*without, 6], [7])]:
        assert not proof(read, bad).holds, (read, bad)
        assert proof(read, bad).in_words().startswith("NOT each sample exactly once")
    assert "1 skipped (sample 6" in proof(without, [6]).in_words()


def test_a_sample_that_gets_lost_in_a_run_is_found():
    """A shard that leaves a sample out, and does not say so."""

    def forgetful(shards):
        return [s and type(s)(s.ids, s.batch, ()) for s in shards]

    def main(run):
        stepping = run._stepping
        stepping._on_device = forgetful
        return training(run)

    facts = finished(main)
    assert not facts["samples_exactly_once"]


def unlucky_samples_are_a_function_of_the_recipe(folder) -> None:
    """The law: which samples are bad hangs on the recipe, also where a data set's code draws it."""

    class Sometimes(Samples):
        def __getitem__(self, sample):
            if torch.rand(()) < 0.03:
                raise ValueError("unlucky")
            return super().__getitem__(sample)

    main = partial(training, data=Sometimes(images(), ()), epochs=3)
    played = assert_same_bits(main, [(4, 1), (4, 3)])
    assert any(entry[4] for entry in played.result[::2])
    sentence = finished(main)["samples_sentence"]
    assert "NOT" not in sentence
    assert sentence.count("exactly once per epoch") > 1


def test_epochs_may_leave_out_different_samples(tmp_path):
    unlucky_samples_are_a_function_of_the_recipe(tmp_path)


def test_all_but_one_sample_may_be_bad():
    data = Samples(images(), bad=[i for i in range(len(images()[0])) if i != 21])
    inline, ahead = (
        play(partial(training, data=data, batch_size=7, epochs=1, loaders=loaders), 4, 1) for loaders in (0, 1)
    )
    assert inline.as_words() == ahead.as_words()
    assert [entry[5] for entry in inline.result[::2]].count(False) == 1


def planned_size(old):
    def faulty(self):
        left_out, self.left_out = self.left_out, ()
        try:
            return old(self)
        finally:
            self.left_out = left_out

    return faulty


def keeps_it_to_itself(old):
    """The first worker alone tells which of its samples were bad."""

    def faulty(self, request, part):
        part.bad = part.bad if self.group.worker.is_first else ()
        return old(self, request, part)

    return faulty


def called_at_once(old):
    """A sample is bad that fails once."""

    def faulty(ids, epoch, source, seed, seed_sample, skip_bad):
        try:
            return old(ids, epoch, source, seed, seed_sample, False)
        except DataError as error:
            bad = int(str(error).split()[1])
            rest = faulty(ids[ids != bad], epoch, source, seed, seed_sample, skip_bad)
            return shard_module.Shard(rest.ids, rest.batch, ((bad, "once"), *rest.bad))

    return faulty


FAULTS = {
    "the mean is over the planned batch": (
        meeting.Meeting,
        "_total",
        planned_size,
        is_the_mean_over_what_was_read,
    ),
    "a worker does not tell": (
        synchronous.LiveSynchronous,
        "update",
        keeps_it_to_itself,
        same_bits_with_bad_samples,
    ),
    "one try is enough": (shard_module, "_shard_of", called_at_once, reading_again_mends),
    "samples are not seeded when they are tried": (
        source_module.Items,
        "read_alone",
        lambda old: lambda self, sample, seed, epoch, seed_sample: self._item(sample),
        unlucky_samples_are_a_function_of_the_recipe,
    ),
    "a sample counts again in each epoch": (
        allowance.Allowance,
        "_with",
        lambda old: lambda self, data, bad: {**self._known, **{(len(self._known), s): e for s, e in bad}},
        budget_counts_each_once,
    ),
    "what is left out stands for what is missing": (
        proof_module.Proof,
        "holds",
        lambda old: property(lambda self: self.due.num_samples == (self.read + self.left_out.count).num_samples),
        proof_needs_declarations,
    ),
    "what was left out is not committed": (
        feed_module.Feed,
        "commit",
        lambda old: lambda self, batch, read, bad=(): old(self, batch, read),
        same_bits_with_bad_samples,
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_found(name, tmp_path):
    owner, attribute, make, law = FAULTS[name]
    with replaced(owner, attribute, make(owner.__dict__[attribute])), pytest.raises((AssertionError, SamestepError)):
        law(tmp_path)
