"""Who takes part in a round, and who is lost: uniform, and a function of the recipe alone."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from samestep.errors import SettingsError
from samestep.federated.sampling import drops_of, num_sampled, poisson_of, sample_of


@given(st.integers(1, 50), st.floats(0.001, 1.0), st.integers(0, 2**63), st.integers(0, 1000))
def test_a_sample_holds_each_client_at_most_once(num_clients, share, seed, round_):
    clients = sample_of(round_, share, num_clients, seed)
    assert clients == sorted(set(clients)) and set(clients) <= set(range(num_clients))
    assert len(clients) == num_sampled(share, num_clients) >= 1
    assert clients == sample_of(round_, share, num_clients, seed)


def test_shares_and_numbers():
    assert [num_sampled(share, 10) for share in (0.3, 0.25, 0.001, 1.0, 1, 10)] == [3, 3, 1, 10, 1, 10]
    assert sample_of(4, 10, 10, 0) == list(range(10))


def frequencies(draw, num_clients, num_rounds):
    counts = [0] * num_clients
    for round_ in range(num_rounds):
        for client in draw(round_):
            counts[client] += 1
    return counts


@pytest.mark.parametrize(
    "draw",
    [
        lambda round_: sample_of(round_, 0.3, 20, 5),
        lambda round_: poisson_of(round_, 0.3, 20, 5),
        lambda round_: drops_of(round_, 0.3, range(20), 5),
    ],
    ids=["sample", "poisson", "drops"],
)
def test_all_clients_are_as_likely(draw):
    expected, deviation = 0.3 * 3000, math.sqrt(0.21 * 3000)
    assert all(abs(count - expected) < 5 * deviation for count in frequencies(draw, 20, 3000))


def test_the_number_varies_where_each_is_drawn_alone():
    sizes = [len(poisson_of(round_, 0.3, 100, 5)) for round_ in range(500)]
    mean = sum(sizes) / 500
    variance = sum((size - mean) ** 2 for size in sizes) / 500
    assert abs(mean - 30) < 1.1 and 15 < variance < 28
    assert poisson_of(0, 1.0, 7, 0) == list(range(7))


def test_losses_do_not_follow_from_the_sample():
    drawn = lost = 0
    for round_ in range(2000):
        clients = poisson_of(round_, 0.3, 20, 5)
        drawn += len(clients)
        lost += len(drops_of(round_, 0.3, clients, 5))
    assert abs(lost / drawn - 0.3) < 5 * math.sqrt(0.21 / drawn)
    assert drops_of(1, 0.0, range(20), 5) == [] and drops_of(1, 1.0, [4, 2], 5) == [4, 2]


def test_samples_are_frozen():
    """Another sample is another result of every run that was recorded: these numbers may not change."""
    assert [sample_of(3, 4, 20, 0), poisson_of(3, 0.2, 20, 0), drops_of(3, 0.2, range(20), 0)] == [
        [2, 14, 15, 19],
        [0, 2, 6, 14, 15, 19],
        [1, 7, 9, 14, 17],
    ]


@pytest.mark.parametrize("share", [0, 11, 0.0, 1.5, -0.1, True, math.nan])
def test_a_sample_that_cannot_be_taken_is_refused(share):
    with pytest.raises(SettingsError, match="You set a sample of"):
        sample_of(0, share, 10, 0)


@pytest.mark.parametrize("rate", [-0.1, 1.1, math.nan])
def test_a_rate_that_is_none_is_refused(rate):
    with pytest.raises(SettingsError, match="You set a rate of lost clients"):
        drops_of(0, rate, [1], 0)
    with pytest.raises(SettingsError, match="You set a sampling rate"):
        poisson_of(0, rate, 10, 0)
