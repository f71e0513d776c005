"""A byte-level GPT that learns to write Python from the source text of Python's own standard library.

    samestep run examples/bytes.py -- --steps 400

Files end anywhere, so windows hold unequal numbers of bytes; `count=` makes the gradient the mean over all bytes of the
batch, as if one device had read it whole. Every tenth file is held out.
"""

import argparse
import math
import os
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import samestep

START, VOCABULARY = 256, 257  # 256 bytes, and one token that starts a document
LENGTH, WIDTH, LAYERS, HEADS = 128, 128, 2, 4
BATCH_SIZE, LEARNING_RATE, WARMUP_STEPS, MAX_BYTES = 16, 3e-3, 20, 2_000_000


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.mix = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm_1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.mix(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks, self.norm = nn.Sequential(*(Block() for _ in range(LAYERS))), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.place.weight, std=0.02)
        self.head.weight = self.embed.weight  # tied

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        places = self.place.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(self.embed(tokens) + places)))


def load_windows() -> tuple[torch.Tensor, torch.Tensor]:
    """Return windows of LENGTH + 1 tokens, (train, held out); -1 fills the last one of a document."""
    train, held_out, num_bytes = [], [], 0
    for number, path in enumerate(sorted(Path(os.__file__).parent.glob("*.py"))):
        text = torch.frombuffer(bytearray(b" " + path.read_bytes()), dtype=torch.uint8).short()
        text[0] = START
        num_bytes += len(text) - 1
        if num_bytes > MAX_BYTES:
            break
        for begin in range(0, len(text) - 1, LENGTH):
            window = text[begin : begin + LENGTH + 1]
            part = held_out if number % 10 == 9 else train
            part.append(F.pad(window, (0, LENGTH + 1 - len(window)), value=-1))
    return torch.stack(train), torch.stack(held_out)


def losses(model: GPT, windows: torch.Tensor, bf16: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of each token, in nats, and whether it counts; both of shape (windows, LENGTH)."""
    tokens, targets = windows[:, :-1].clamp(min=0).long(), windows[:, 1:].long()
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=bf16):
        logits = model(tokens)
    return F.cross_entropy(logits.float().mT, targets, ignore_index=-1, reduction="none"), targets >= 0


def write(model: GPT, num_bytes: int, prompt: bytes = b"def ") -> str:
    """Return text that the model continues."""
    device, generator = model.embed.weight.device, torch.Generator().manual_seed(0)
    tokens = [START, *prompt]
    with torch.no_grad():
        for _ in range(num_bytes):
            logits = model(torch.tensor([tokens[-LENGTH:]], device=device))[0, -1, :START]
            tokens.append(int(torch.multinomial((logits / 0.7).softmax(0).cpu(), 1, generator=generator)))
    return bytes(tokens[1:]).decode("utf-8", "replace")


def main(run: samestep.Run, num_steps: int, bf16: bool) -> dict[str, float]:
    train, held_out = load_windows()
    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min((n + 1) / WARMUP_STEPS, 0.55 + 0.45 * math.cos(math.pi * n / num_steps))
    )
    run.replicate(model, optimizer, scheduler)
    for step in run.steps(train, BATCH_SIZE, steps=num_steps):
        for windows in step:
            loss, counts = losses(model, windows, bf16)
            step.backward(loss.sum() / counts.sum(), count=counts.sum().item())
        step.update(clip_norm=1.0)
        scheduler.step()
        run.log(bits_per_byte=step.loss / math.log(2))

    def nats_and_bytes(windows: torch.Tensor) -> dict[str, torch.Tensor]:
        loss, counts = losses(model, windows, bf16)
        return {"nats": loss.sum(1), "bytes": counts.sum(1)}

    total = run.mean(nats_and_bytes, held_out, batch_size=BATCH_SIZE)
    print(run.once(lambda: write(model, 300)))
    return {"held-out bits per byte": total["nats"] / total["bytes"] / math.log(2)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a byte-level GPT on Python's standard library.")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 where that is safe (slow on old CPUs)")
    args = parser.parse_args()
    result = samestep.launch(lambda run: main(run, args.steps, args.bf16), replicas=8, seed=0)
    print(f"held-out bits per byte: {result['held-out bits per byte']:.3f}")
