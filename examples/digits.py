"""Handwritten digits: a small convolutional network on scikit-learn's 1,797 images of 8 x 8 pixels.

    samestep run examples/digits.py                  all cores
    samestep run examples/digits.py --workers 1      the same weights, to the last bit
    python examples/digits.py

A fixed fifth of the images, 360, is held out; the network learns from the other 1,437.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import samestep

NUM_HELD_OUT = 360
BATCH_SIZE = 128
LEARNING_RATE = 3e-3


class Net(nn.Module):
    """Three convolutions with BatchNorm, dropout, one linear layer."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.blocks = nn.Sequential(
            *block(1, width), *block(width, 2 * width), nn.MaxPool2d(2), *block(2 * width, 2 * width), nn.MaxPool2d(2)
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(8 * width, 10))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(images))


def block(channels_in: int, channels_out: int) -> list[nn.Module]:
    convolution = nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(channels_out), nn.ReLU()]


def load_data() -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Return (images, digits) to train on, and those held out."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held_out, train = order[:NUM_HELD_OUT], order[NUM_HELD_OUT:]
    return (images[train], labels[train]), (images[held_out], labels[held_out])


def main(run: samestep.Run, epochs: int) -> dict[str, float]:
    train, held_out = load_data()
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    num_steps = epochs * -(-len(train[0]) // BATCH_SIZE)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=num_steps)
    run.replicate(model, optimizer, scheduler)

    def is_right(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        images, labels = batch
        return (model(images).argmax(dim=1) == labels).float()

    for step in run.steps(train, BATCH_SIZE, epochs):
        for images, labels in step:
            step.backward(F.cross_entropy(model(images), labels))
        step.update()
        scheduler.step()
        if step.ends_epoch:
            run.log(accuracy=run.mean(is_right, held_out, batch_size=NUM_HELD_OUT // 8))
    return {"held-out accuracy": run.mean(is_right, held_out, batch_size=NUM_HELD_OUT // 8)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a small network on handwritten digits.")
    parser.add_argument("--epochs", type=int, default=12)
    args = parser.parse_args()
    result = samestep.launch(lambda run: main(run, args.epochs), replicas=8, seed=0)
    print(f"held-out accuracy: {result['held-out accuracy']:.2%}")
