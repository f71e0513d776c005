"""What the tests of bad input share: a small script, and the check that it ends with one clear error."""

from __future__ import annotations

import re

import pytest
import torch
from playing import play
from zoo import Perceptron, classes_loss, vectors


def made(run, optimizer=torch.optim.SGD, model=Perceptron, **settings):
    """Return a replicated model and its optimizer."""
    built = model()
    stepper = optimizer(built.parameters(), lr=0.05)
    run.replicate(built, stepper, **settings)
    return built, stepper


def train(run, model, *, before=None, after=None, inside=None, steps=3, data=None):
    """Train some steps, and call what is given at its place with the step."""
    for step in run.steps(data or vectors(), batch_size=19, steps=steps):
        if before:
            before(step)
        for batch in step:
            loss = classes_loss(model, batch)
            if inside:
                loss = inside(step, batch, loss)
            if loss is not None:
                step.backward(loss)
        step.update()
        if after:
            after(step)


def refused(error, words, main, workers=(1, 3), replicas=4, **settings) -> str:
    """See that `main` ends with `error`, whose message has all `words`; return the message."""
    message = ""
    for count in workers:
        with pytest.raises(error) as caught:
            play(main, replicas, count, **settings)
        message = str(caught.value)
        for word in words:
            assert re.search(word, message), f"{word!r} is not in: {message}"
    return message
