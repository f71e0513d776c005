"""The law: the same bits on any number of workers, whatever the model, the optimizer, and the loop."""

from __future__ import annotations

import pytest
from loops import LOOPS, training
from playing import EIGHT, FIVE, assert_same_bits
from zoo import MODELS, OPTIMIZERS

SHORT = "convolutional", "odd"
"""Models that `make test` trains with Adafactor too, which takes longest."""
PAIRS = [
    pytest.param(model, optimizer, marks=[pytest.mark.long] * (optimizer == "adafactor" and model not in SHORT))
    for model in MODELS
    for optimizer in OPTIMIZERS
]


@pytest.mark.parametrize(("model", "optimizer"), PAIRS)
def test_models_and_optimizers(model, optimizer):
    # Eight replicas are a whole tree; five are not, and say more.
    assert_same_bits(training(model, optimizer), EIGHT + FIVE if optimizer == "adamw" else FIVE)


@pytest.mark.parametrize("loop", LOOPS)
def test_loops(loop):
    settings = LOOPS[loop]
    assert_same_bits(settings.main, settings.fleets)
