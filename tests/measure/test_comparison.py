from samestep.measure.comparison import first_difference


def trace(*digests, loss=0.5):
    return [
        {"step": step, "loss": loss, "tensors": dict(zip("ab", pair, strict=True))} for step, pair in enumerate(digests)
    ]


SAME = ("1x", "2x", "3x")


def test_equal_traces_have_no_difference():
    assert first_difference({1: trace(*SAME), 2: trace(*SAME), 3: trace(*SAME)}) is None


def test_the_earliest_step_over_all_counts_is_named_with_its_tensors():
    late, early = trace("1x", "2x", "3y"), trace("1x", "2y", "3y")
    difference = first_difference({1: trace(*SAME), 2: late, 3: early})
    assert (difference.workers, difference.against, difference.step, difference.tensors) == (3, 1, 1, ("b",))
    assert difference.in_words() == (
        "Step 1 is the first to differ between the runs with 3 workers and with 1: tensor 'b'."
    )


def test_the_first_of_several_tensors_is_named():
    assert "tensor 'a' and 1 other." in first_difference({1: trace("1x"), 2: trace("2y")}).in_words()


def test_a_loss_that_differs_is_a_difference():
    difference = first_difference({1: trace("1x"), 2: trace("1x", loss=0.25)})
    assert (difference.what, difference.step) == ("loss", 0)


def test_nan_equals_nan():
    nan = float("nan")
    assert first_difference({1: trace("1x", loss=nan), 2: trace("1x", loss=-nan)}) is None


def test_fewer_steps_and_other_tensors_are_differences():
    assert first_difference({1: trace(*SAME), 2: trace("1x")}).what == "steps"
    other = [{"step": 0, "loss": 0.5, "tensors": {"a": "1", "c": "x"}}]
    difference = first_difference({1: trace("1x"), 2: other})
    assert (difference.what, difference.tensors) == ("names", ("b", "c"))
