"""The law: the same bits on any number of workers, whatever the model, the optimizer, and the loop."""

from __future__ import annotations

import pytest
from loops import LOOPS, training
from playing import EIGHT, FIVE, assert_same_bits
from zoo import MODELS, OPTIMIZERS


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
def test_models_and_optimizers(model, optimizer):
    assert_same_bits(training(model, optimizer), EIGHT + FIVE)


@pytest.mark.parametrize("loop", LOOPS)
def test_loops(loop):
    settings = LOOPS[loop]
    assert_same_bits(settings.main, settings.fleets)
