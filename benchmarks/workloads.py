"""What is trained in the comparison: the same models, data and batches for every contestant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

Data = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One model with its data.

    Attributes:
        title: for tables.
        model: makes the model; its parameters come from the global generator.
        data: makes inputs and targets.
        loss: (model, inputs, targets) -> mean loss.
        batch_size: samples per step, over all workers.
        num_steps: timed steps that take a few seconds on one core.
    """

    title: str
    model: Callable[[], nn.Module]
    data: Callable[[], Data]
    loss: Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]
    batch_size: int
    num_steps: int


class Block(nn.Module):
    """A transformer's layer: causal attention and a perceptron."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm_1(x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mix(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    """A small GPT with tied embeddings."""

    def __init__(self, vocabulary: int = 256, length: int = 128, width: int = 256, num_layers: int = 4):
        super().__init__()
        self.embed, self.place = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, num_heads=4) for _ in range(num_layers)))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) + self.place.weight[: tokens.shape[1]]
        return F.linear(self.norm(self.blocks(x)), self.embed.weight)


def cnn(width: int = 32) -> nn.Module:
    """Return the digits example's network."""

    def block(channels_in: int, channels_out: int) -> list[nn.Module]:
        convolution = nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(channels_out), nn.ReLU()]

    return nn.Sequential(
        *block(1, width),
        *block(width, 2 * width),
        nn.MaxPool2d(2),
        *block(2 * width, 2 * width),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(8 * width, 10),
    )


def perceptron(width: int, num_layers: int) -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(num_layers):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def digits() -> Data:
    loaded = load_digits()
    return torch.tensor(loaded.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(loaded.target)


def noise(num_samples: int, width: int) -> Data:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(num_samples, width, generator=generator)
    return inputs, torch.randint(width, (num_samples,), generator=generator)


def tokens() -> Data:
    drawn = torch.randint(256, (512, 129), generator=torch.Generator().manual_seed(0))
    return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


def class_loss(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(inputs), targets)


def token_loss(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of every contestant: AdamW in its fastest form on a CPU."""
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


WORKLOADS = {
    "cnn": Workload(title="digits CNN", model=cnn, data=digits, loss=class_loss, batch_size=128, num_steps=60),
    "mlp": Workload(
        title="wide MLP",
        model=lambda: perceptron(width=2048, num_layers=4),
        data=lambda: noise(1024, 2048),
        loss=class_loss,
        batch_size=64,
        num_steps=24,
    ),
    "gpt": Workload(title="small GPT", model=GPT, data=tokens, loss=token_loss, batch_size=16, num_steps=8),
    "small": Workload(
        title="100 small tensors",
        model=lambda: perceptron(width=32, num_layers=50),
        data=lambda: noise(1024, 32),
        loss=class_loss,
        batch_size=8,
        num_steps=300,
    ),
}
