"""The law: where parameters and inputs lay in memory changes nothing."""

from __future__ import annotations

import pytest
import torch
from playing import Played, play
from zoo import MODELS, OPTIMIZERS

SHIFTS = (4, 8, 16)


def shifted(tensor: torch.Tensor, num_bytes: int) -> torch.Tensor:
    """Return a copy that starts `num_bytes` after a multiple of 64."""
    if not tensor.numel() or num_bytes % tensor.element_size():
        return tensor
    memory = torch.zeros(tensor.numel() * tensor.element_size() + 192, dtype=torch.uint8)
    start = -memory.data_ptr() % 64 + num_bytes
    copy = memory[start : start + tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape)
    assert copy.data_ptr() % 64 == num_bytes
    return copy.copy_(tensor)


class Rows(torch.utils.data.Dataset):
    """Gives samples one by one."""

    def __init__(self, columns: tuple):
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns[0])

    def __getitem__(self, index: int) -> tuple:
        return tuple(column[index] for column in self.columns)


def play_shifted(model_name: str, weights_by: int, inputs_by: int, workers: int, collated: bool = True) -> Played:
    """Train with parameters, buffers and inputs that start where they should not."""
    make, data, loss_of = MODELS[model_name]

    def collate(samples: list) -> tuple:
        return tuple(shifted(torch.stack(column), inputs_by) for column in zip(*samples, strict=True))

    def main(run):
        model = make()
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.data = shifted(tensor.data, weights_by)
        optimizer = OPTIMIZERS["adamw"](model.parameters())
        run.replicate(model, optimizer)
        told = []
        source = Rows(data()) if collated else tuple(shifted(column, inputs_by) for column in data())
        for step in run.steps(source, batch_size=19, epochs=1, collate=collate if collated else None):
            for batch in step:
                for tensor in (*model.parameters(), *model.buffers(), *batch):
                    assert tensor.data_ptr() % 64 == 0, "a shard sees memory that is not aligned"
                step.backward(loss_of(model, batch))
            step.update()
            told.append(step.loss)
        return told

    return play(main, 8, workers)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("collated", [True, False])
def test_shifts_change_nothing(model, collated):
    expected = play_shifted(model, 0, 0, 2, collated)
    for shift in SHIFTS:
        assert play_shifted(model, shift, shift, 2, collated).as_words() == expected.as_words()
