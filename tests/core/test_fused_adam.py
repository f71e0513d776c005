"""The direct way to the fused kernels gives the bits of `step`, and is taken only where it does the same."""

import pytest
import torch

from samestep.core.fused_adam import FusedAdam, fits


@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.1, "maximize": True}, {"betas": (0.5, 0.7), "eps": 1e-3}])
def test_the_bits_are_those_of_step(cls, settings):
    generator = torch.Generator().manual_seed(0)
    pieces = [torch.randn(n, generator=generator) for n in (1, 33, 5000)]
    twins = [p.clone() for p in pieces]
    optimizer, reference = cls(pieces, lr=1e-2, fused=True, **settings), cls(twins, lr=1e-2, fused=True, **settings)
    direct = None
    for number in range(4):
        gradients = [torch.randn(p.shape, generator=generator) for p in pieces]
        for group in (*optimizer.param_groups, *reference.param_groups):
            group["lr"] = 1e-2 / (number + 1)
        for twin, gradient in zip(twins, gradients, strict=True):
            twin.grad = gradient.clone()
        reference.step()
        if direct is None:
            for piece, gradient in zip(pieces, gradients, strict=True):
                piece.grad = gradient.clone()
            optimizer.step()
            direct = FusedAdam.of(pieces, optimizer.state)
        else:
            assert fits(optimizer)
            direct.step(optimizer, optimizer.param_groups[0], gradients)
        for piece, twin in zip(pieces, twins, strict=True):
            assert piece.numpy().tobytes() == twin.numpy().tobytes()
            for key, value in reference.state[twin].items():
                assert torch.equal(optimizer.state[piece][key], value), key


def test_pieces_without_state_are_left_to_step():
    piece = torch.zeros(4)
    assert FusedAdam.of([piece], torch.optim.AdamW([piece], fused=True).state) is None


@pytest.mark.parametrize(
    "settings", [{}, {"fused": True, "amsgrad": True}, {"fused": True, "lr": torch.tensor(0.1)}, {"foreach": True}]
)
def test_other_settings_are_left_to_step(settings):
    assert not fits(torch.optim.AdamW([torch.zeros(4)], **settings))


def test_other_classes_are_left_to_step():
    class Mine(torch.optim.AdamW):
        pass

    assert not fits(Mine([torch.zeros(4)], fused=True))
    assert not fits(torch.optim.SGD([torch.zeros(4)], fused=True))
    assert fits(torch.optim.AdamW([torch.zeros(4)], fused=True))
