"""Small models, data and optimizers that the laws are held over."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

NUM_CLASSES = 5
VOCABULARY = 24
WORDS = 10


@functools.cache
def vectors(num_samples: int = 53, width: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features and classes."""
    generator = torch.Generator().manual_seed(5)
    return (
        torch.randn(num_samples, width, generator=generator),
        torch.randint(0, NUM_CLASSES, (num_samples,), generator=generator),
    )


@functools.cache
def images(num_samples: int = 53) -> tuple[torch.Tensor, torch.Tensor]:
    """Return 8 x 8 images and classes."""
    generator = torch.Generator().manual_seed(6)
    return (
        torch.randn(num_samples, 1, 8, 8, generator=generator),
        torch.randint(0, NUM_CLASSES, (num_samples,), generator=generator),
    )


@functools.cache
def texts(num_samples: int = 53) -> tuple[torch.Tensor, torch.Tensor]:
    """Return words, and the words to predict; -100 where nothing is to be predicted."""
    generator = torch.Generator().manual_seed(7)
    words = torch.randint(0, VOCABULARY, (num_samples, WORDS + 1), generator=generator)
    targets = words[:, 1:].clone()
    lengths = torch.randint(0, WORDS + 1, (num_samples, 1), generator=generator)
    targets[torch.arange(WORDS) >= lengths] = -100
    return words[:, :-1].clone(), targets


class Perceptron(nn.Module):
    """The inner weight has 60,000 elements, more than three granules, so that its blocks have several owners."""

    def __init__(self, width: int = 20, hidden: int = 300):
        super().__init__()
        self.first = nn.Linear(width, hidden)
        self.inner = nn.Linear(hidden, 200)
        self.last = nn.Linear(200, NUM_CLASSES)

    def forward(self, x):
        return self.last(F.relu(self.inner(F.relu(self.first(x)))))


class Convolutional(nn.Module):
    """With batch statistics and dropout."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.inner = nn.Linear(4 * 64, 208)
        self.flat_norm = nn.BatchNorm1d(208)
        self.dropout = nn.Dropout(0.3)
        self.last = nn.Linear(208, NUM_CLASSES)

    def forward(self, x):
        x = F.relu(self.norm(self.first(x)))
        x = F.relu(self.second(x)).flatten(1)
        return self.last(self.dropout(F.relu(self._normed(self.inner(x)))))

    def _normed(self, x):
        # A single sample has no batch statistics, and torch refuses to take them.
        return self.flat_norm(x) if len(x) > 1 or not self.training else F.layer_norm(x, x.shape[1:])


class Transformer(nn.Module):
    """The embedding is also the output layer."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.place = nn.Parameter(torch.randn(WORDS, width) * 0.02)
        self.norm = nn.LayerNorm(width)
        # Without bias: that of the keys has no gradient but rounding errors, which some optimizers blow up.
        self.mix = nn.Linear(width, 3 * width, bias=False)
        self.wide = nn.Linear(width, 3100)
        self.narrow = nn.Linear(3100, width)
        self.dropout = nn.Dropout(0.1)
        self.last_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, words):
        x = self.embedding(words) + self.place
        queries, keys, values = self.mix(self.norm(x)).chunk(3, -1)
        x = x + F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.dropout(self.narrow(F.gelu(self.wide(x))))
        return self.head(self.last_norm(x))


class Odd(nn.Module):
    """With a part nobody uses, a frozen one, and one for some samples, so that some shards do not use it."""

    def __init__(self):
        super().__init__()
        self.body = Perceptron()
        self.nobody = nn.Linear(3, 3)
        self.frozen = nn.Linear(20, 20).requires_grad_(False)
        self.sometimes = nn.Linear(20, NUM_CLASSES)

    def forward(self, x):
        out = self.body(self.frozen(x))
        chosen = x[:, :1] > 1.0
        return out + chosen * self.sometimes(x) if chosen.any() else out


class Shapes(nn.Module):
    """Parameters of odd shapes: a number, one element, a transposed matrix."""

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.5))
        self.one = nn.Parameter(torch.zeros(1))
        self.turned = nn.Parameter(torch.randn(60, 20).mul_(0.1).t())
        self.last = nn.Linear(60, NUM_CLASSES)

    def forward(self, x):
        out = self.last((x @ self.turned).relu()) * self.temperature
        return torch.cat([out[:, :1] + self.one, out[:, 1:]], 1)


def classes_loss(model: nn.Module, batch: tuple, reduction: str = "mean") -> torch.Tensor:
    """Return the loss of a classifier."""
    x, y = batch
    return F.cross_entropy(model(x), y, reduction=reduction)


def words_loss(model: nn.Module, batch: tuple, reduction: str = "mean") -> torch.Tensor:
    """Return the loss of a language model over all words (none is left out)."""
    words, targets = batch
    return F.cross_entropy(model(words).flatten(0, 1), targets.clamp(min=0).flatten(), reduction=reduction)


MODELS: dict[str, tuple[Callable, Callable, Callable]] = {
    "perceptron": (Perceptron, vectors, classes_loss),
    "convolutional": (Convolutional, images, classes_loss),
    "transformer": (Transformer, texts, words_loss),
    "odd": (Odd, vectors, classes_loss),
    "shapes": (Shapes, vectors, classes_loss),
}
"""Model, data, loss (model, batch) -> scalar."""

OPTIMIZERS: dict[str, Callable] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, eps=1e-6),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-2),
}
"""Element kinds, and one that looks at whole tensors."""


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that are trained."""
    return [p for p in model.parameters() if p.requires_grad]
