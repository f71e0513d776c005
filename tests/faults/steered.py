"""A training to be interrupted: prints each step, and its result at the end. Its first argument says how."""

import json
import sys
import time

import torch
from torch.nn import functional as F

import samestep

mode, seconds = sys.argv[1], float(sys.argv[2])
rest = dict(word.split("=") for word in sys.argv[3:])
STEPS = 60


def main(run):
    if mode == "builds":
        print("building", flush=True)
        time.sleep(60)
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(256, 16, generator=generator), torch.randint(4, (256,), generator=generator)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Dropout(0.1), torch.nn.Linear(32, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
    run.replicate(model, optimizer, scheduler)
    losses = []
    try:
        for step in run.steps((x, y), 24, steps=STEPS):
            for a, b in step:
                step.backward(F.cross_entropy(model(a), b))
                if mode == "shard" and step.number == 5:
                    print("in a shard", flush=True)
                    time.sleep(60)
            step.update()
            scheduler.step()
            losses.append(step.loss)
            print(f"step {step.number}", flush=True)
            time.sleep(seconds)
    except Exception:
        print("swallowed by except Exception", flush=True)
    except BaseException:
        if mode != "swallows":
            raise
        print("swallowed", flush=True)

    def slowly(batch):
        if mode == "fails":
            print("fails", flush=True)
            raise ValueError("of the script")
        if mode == "mean":
            print("in run.mean", flush=True)
            time.sleep(60)
        return (model(batch[0]).argmax(1) == batch[1]).float()

    accuracy = run.mean(slowly, (x, y), 50)
    print("after the steps", flush=True)
    return {"losses": sum(losses), "accuracy": accuracy, "digest": run.digest()}


if __name__ == "__main__":
    result = samestep.launch(main, replicas=4, **rest)
    print(json.dumps(result))
