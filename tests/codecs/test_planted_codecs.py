"""A fault planted in a codec makes a law fail; a set of laws that lets one live is too weak."""

from __future__ import annotations

from collections.abc import Callable

import codec_laws
import numpy as np
import pytest
import torch
from codec_laws import CODECS
from test_error_feedback import test_a_bad_round_is_not_kept as a_bad_round_is_not_kept
from test_error_feedback import test_a_residual_that_is_not_finite as a_bad_residual_is_an_error

from samestep.codecs import (
    Codec,
    Exact,
    Feedback,
    Int4,
    Int8,
    PowerSGD,
    RandomK,
    Sign,
    TopK,
    feedback,
    integer,
    noise,
    power,
    sign,
    sparse,
)
from samestep.codecs.codec import Codec as Base

Patch = pytest.MonkeyPatch
Law = Callable[[Codec], None]


def feedback_with(change: Callable[[Feedback, torch.Tensor, tuple, dict], torch.Tensor]) -> Callable[[Patch], None]:
    return lambda patch: patch.setattr(Feedback, "_pack", change)


def residual_dropped(self, values, key, state):
    return self.codec.encode(values + state["residual"], key, state)


def residual_of_another_payload(self, values, key, state):
    compensated = values + state["residual"]
    payload = self.codec.encode(compensated, key, dict(state))
    other = self.codec.encode(values, (*key, 1), state)
    state["residual"] = compensated - self.codec.decode(other, values.shape, values.dtype)
    return payload


def residual_added_twice(self, values, key, state):
    compensated = values + 2 * state["residual"]
    payload = self.codec.encode(compensated, key, state)
    state["residual"] = compensated - self.codec.decode(payload, values.shape, values.dtype)
    return payload


def residual_of_what_was_given(self, values, key, state):
    payload = self.codec.encode(values + state["residual"], key, state)
    state["residual"] = values - self.codec.decode(payload, values.shape, values.dtype)
    return payload


def residual_written_in_place(self, values, key, state):
    compensated = values + state["residual"]
    payload = self.codec.encode(compensated, key, state)
    state["residual"].copy_(compensated - self.codec.decode(payload, values.shape, values.dtype))
    return payload


def key_ignored(patch: Patch) -> None:
    for module in (integer, sparse):
        patch.setattr(module, "seed_of", lambda key: 7)


def part_of_the_key_ignored(patch: Patch) -> None:
    patch.setattr(integer, "seed_of", lambda key: noise.seed_of(key[:-1]))


def global_generator(patch: Patch) -> None:
    def drawn(self, count):
        return np.random.randint(0, 2**63, count).astype("<u8")

    patch.setattr(noise.Noise, "_drawn", drawn)


def own_counter(patch: Patch) -> None:
    """The noise depends on how many tensors this process has encoded."""
    count = iter(range(1 << 30))
    patch.setattr(integer, "seed_of", lambda key: noise.seed_of((*key, next(count))))


def always_down(patch: Patch) -> None:
    patch.setattr(noise.Noise, "uint16", lambda self, count: np.zeros(count, np.uint16))


def always_nearest(patch: Patch) -> None:
    patch.setattr(noise.Noise, "uint16", lambda self, count: np.full(count, 32_768, np.uint16))


def nan_hidden(patch: Patch) -> None:
    old = Base.encode
    patch.setattr(Base, "encode", lambda self, tensor, *rest: old(self, torch.nan_to_num(tensor, 0, 0, 0), *rest))


def looks_at_what_is_sent_only(patch: Patch) -> None:
    patch.setattr(sparse, "_is_finite", lambda flat: True)


def nan_kept(patch: Patch) -> None:
    patch.setattr(feedback, "_is_finite", lambda tensor: True)


def denormal_scales_rounded_down(patch: Patch) -> None:
    patch.setattr(integer.np, "nextafter", lambda a, b: a)


def no_cap(patch: Patch) -> None:
    patch.setattr(Int8, "_scales", lambda self, most: most / most.dtype.type(127))


def scale_of_another_block(patch: Patch) -> None:
    old = Int8._scales
    patch.setattr(Int8, "_scales", lambda self, most: np.roll(old(self, most), 1))


def last_of_equals(patch: Patch) -> None:
    def largest(flat: np.ndarray, count: int) -> np.ndarray:
        return np.sort(np.argsort(np.abs(flat), kind="stable")[len(flat) - count :])

    patch.setattr(sparse, "_largest", largest)


def smallest_sent(patch: Patch) -> None:
    patch.setattr(sparse, "_largest", lambda flat, count: np.sort(np.argsort(np.abs(flat))[:count]))


def drawn_with_return(patch: Patch) -> None:
    def drawn(seed: int, sent: int, count: int) -> np.ndarray:
        return np.random.Philox(key=seed).random_raw(sent).astype(np.int64) % max(count, 1)

    patch.setattr(sparse, "_drawn", drawn)


def memory_shared(patch: Patch) -> None:
    patch.setattr(Exact, "_pack", lambda self, values, key, state: values.reshape(-1).view(torch.uint8))


def one_byte_more(patch: Patch) -> None:
    old = Base.encode
    patch.setattr(Base, "encode", lambda self, *rest: torch.cat([old(self, *rest), torch.zeros(1, dtype=torch.uint8)]))


def largest_for_mean(patch: Patch) -> None:
    patch.setattr(sign, "_means", lambda rows: np.abs(rows).max(axis=1))


def remembers_by_itself(patch: Patch) -> None:
    """Q lies in the module, not in the state."""
    hidden: dict = {}
    old = PowerSGD._pack

    def pack(self, values, key, state):
        mine = {**state, **hidden.get(values.shape, {})}
        payload = old(self, values, key, mine)
        hidden[values.shape] = {name: entry for name, entry in mine.items() if name == "q"}
        return payload

    patch.setattr(PowerSGD, "_pack", pack)


def not_orthonormal(patch: Patch) -> None:
    patch.setattr(power.torch.linalg, "qr", lambda a: (a / a.norm(dim=0).clamp(min=1e-30), None))


def strides_as_they_lie(patch: Patch) -> None:
    def encode(self, tensor, key=(), state=None):
        flat = tensor.detach().float()
        if not tensor.is_contiguous():
            flat = flat.as_strided((flat.numel(),), (1,)).view(flat.shape)
        return self._pack(flat.contiguous(), key, self.fresh(tensor.shape) if state is None else state)

    patch.setattr(Base, "encode", encode)


def ties(codec: TopK) -> None:
    from test_codec_contract import test_of_equal_elements_the_first_are_sent as law

    law(0.3)


def chances(codec: RandomK) -> None:
    from test_codec_contract import test_every_element_has_the_same_chance as law

    law(0.3)


FAULTS: list[tuple[Callable[[Patch], None], Law, Codec]] = [
    (feedback_with(residual_dropped), codec_laws.conserves_with_feedback, TopK(0.3)),
    (feedback_with(residual_dropped), codec_laws.conserves_with_feedback, Int8()),
    (feedback_with(residual_of_another_payload), codec_laws.conserves_with_feedback, Int8()),
    (feedback_with(residual_added_twice), codec_laws.conserves_with_feedback, Sign()),
    (feedback_with(residual_of_what_was_given), codec_laws.conserves_with_feedback, TopK(0.3)),
    (feedback_with(residual_written_in_place), codec_laws.keeps_no_secrets, Feedback(Int8())),
    (nan_kept, a_bad_round_is_not_kept, Sign()),
    (nan_kept, lambda codec: a_bad_residual_is_an_error(), Int8()),
    (key_ignored, codec_laws.draws_from_its_key, Int8()),
    (key_ignored, codec_laws.draws_from_its_key, RandomK(0.1)),
    (part_of_the_key_ignored, codec_laws.draws_from_its_key, Int4()),
    (global_generator, codec_laws.depends_on_its_arguments_alone, Int8()),
    (global_generator, codec_laws.depends_on_its_arguments_alone, RandomK(0.1)),
    (own_counter, codec_laws.depends_on_its_arguments_alone, Int4()),
    (always_down, codec_laws.is_unbiased_if_it_says_so, Int8()),
    (always_nearest, codec_laws.is_unbiased_if_it_says_so, Int4()),
    (nan_hidden, codec_laws.shows_what_is_not_finite, TopK()),
    (nan_hidden, codec_laws.shows_what_is_not_finite, Int8()),
    (looks_at_what_is_sent_only, codec_laws.shows_what_is_not_finite, RandomK(0.1)),
    (denormal_scales_rounded_down, codec_laws.keeps_its_bound, Int8()),
    (no_cap, codec_laws.keeps_its_bound, Int8()),
    (scale_of_another_block, codec_laws.keeps_its_bound, Int8(block=6)),
    (last_of_equals, ties, TopK()),
    (smallest_sent, codec_laws.keeps_its_bound, TopK(0.3)),
    (drawn_with_return, chances, RandomK()),
    (memory_shared, codec_laws.owns_its_memory, Exact()),
    (one_byte_more, codec_laws.states_its_bytes, Sign()),
    (largest_for_mean, codec_laws.keeps_its_bound, Sign()),
    (remembers_by_itself, codec_laws.depends_on_its_arguments_alone, PowerSGD(2)),
    (not_orthonormal, codec_laws.keeps_its_bound, PowerSGD(4)),
    (strides_as_they_lie, codec_laws.ignores_strides_and_dtypes, Sign()),
]


@pytest.mark.parametrize(
    ("plant", "law", "codec"), FAULTS, ids=[f"{number}-{codec!r}" for number, (_, _, codec) in enumerate(FAULTS)]
)
def test_fault_is_found(plant: Callable[[Patch], None], law: Law, codec: Codec, monkeypatch: pytest.MonkeyPatch):
    law(codec)
    with monkeypatch.context() as patch:
        plant(patch)
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            law(codec)
    law(codec)


def test_faults_in_most_codecs():
    assert len({type(codec) for _, _, codec in FAULTS}) >= len(CODECS) - 2
