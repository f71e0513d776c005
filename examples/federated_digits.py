"""Handwritten digits that never leave their owners: 1,000 clients with one or two images each, mostly of one digit.

    samestep run examples/federated_digits.py                  all cores
    samestep run examples/federated_digits.py --workers 1      the same weights, to the last bit
    python examples/federated_digits.py --rounds 20

In each round a fifth of the clients train for two epochs on what they have, and a server takes the mean of what they
did as a gradient for SGD with momentum (FedAvgM: Hsu et al. 2019). The 360 images held out are those of digits.py.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import samestep

NUM_HELD_OUT = 360
NUM_CLIENTS = 1_000
SKEW = 0.3
"""Concentration of a client's labels: 100 is nearly alike, 0.1 one label each."""


def load_data() -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Return (images of 64 pixels, digits) to train on, and those held out."""
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held_out, train = order[:NUM_HELD_OUT], order[NUM_HELD_OUT:]
    return (images[train], labels[train]), (images[held_out], labels[held_out])


def main(run: samestep.Run, rounds: int) -> dict[str, float]:
    train, held_out = load_data()
    clients = samestep.Clients.by_label_skew(train, train[1], NUM_CLIENTS, alpha=SKEW, seed=0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, rounds)
    federated = samestep.Federated(clients, sample=0.2, outer=samestep.Momentum(lr=1.0, momentum=0.9))
    run.replicate(model, optimizer, scheduler, agree=federated)

    def is_right(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        images, labels = batch
        return (model(images).argmax(dim=1) == labels).float()

    for step in run.steps(clients, batch_size=16, epochs=2, steps=rounds):
        for images, labels in step:
            step.backward(F.cross_entropy(model(images), labels))
        step.update()
        scheduler.step()
        if step.number % 10 == 9:
            run.log(accuracy=run.mean(is_right, held_out, batch_size=NUM_HELD_OUT // 8))
    return {"held-out accuracy": run.mean(is_right, held_out, batch_size=NUM_HELD_OUT // 8)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a small network on digits of 1,000 clients.")
    parser.add_argument("--rounds", type=int, default=60)
    args = parser.parse_args()
    result = samestep.launch(lambda run: main(run, args.rounds), seed=0)
    print(f"held-out accuracy: {result['held-out accuracy']:.2%}")
