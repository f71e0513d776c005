"""Each client reads its own samples and no other's; label skew deals every sample once, alike on every machine."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from samestep.data.source import as_source
from samestep.errors import SettingsError
from samestep.federated.clients import Clients
from samestep.federated.skew import _exp, _log, _log_gammas, dirichlet, label_skew

X, Y = torch.arange(20.0).reshape(10, 2), torch.arange(10)


def samples_of(data):
    source = as_source(data)
    return source.fetch(np.arange(source.num_samples), 0, 0, lambda seed, epoch, sample: None)


@pytest.mark.parametrize(
    "data",
    [(X, Y), TensorDataset(X, Y), (X.numpy(), Y.numpy()), [(X[i], Y[i]) for i in range(10)], as_source((X, Y))],
    ids=["tuple", "TensorDataset", "arrays", "list", "source"],
)
def test_a_client_reads_its_own_samples(data):
    clients = Clients.by_indices(data, [[7, 1], np.array([0, 9, 4]), torch.tensor([2])])
    assert len(clients) == clients.num_clients == 3
    assert [clients.len_of(client) for client in range(3)] == [2, 3, 1]
    for client, owned in enumerate([[7, 1], [0, 9, 4], [2]]):
        assert len(as_source(clients.data_of(client))) == len(owned)
        x, y = samples_of(clients.data_of(client))
        assert torch.equal(x, X[owned]) and y.tolist() == owned


def test_dicts_and_single_columns_are_divided_too():
    assert samples_of(Clients.by_indices(X, [[3], [1, 2]]).data_of(1)).tolist() == X[1:3].tolist()
    assert samples_of(Clients.by_indices({"y": Y}, [[3], [1, 2]]).data_of(1))["y"].tolist() == [1, 2]


def test_given_data_sets_are_handed_out_as_they_are():
    sets = [[1, 2], (X, Y), TensorDataset(X)]
    clients = Clients.of(sets)
    assert all(clients.data_of(client) is data for client, data in enumerate(sets))
    assert [clients.len_of(client) for client in range(3)] == [2, 10, 10]


def test_data_is_made_when_it_is_read():
    made = []

    def make(client):
        made.append(client)
        return list(range(client + 1))

    clients = Clients.made_by(make, [1, 2, 3, 5])
    assert clients.len_of(2) == 3 and not made
    assert clients.data_of(2) == [0, 1, 2] and made == [2]
    with pytest.raises(SettingsError, match="Client 3 was to have 5 samples, but the data made for it has 4"):
        clients.data_of(3)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Clients.of([]), "There are no clients"),
        (lambda: Clients.of([[1], [], [2], []]), "Clients 1, 3 of 4 without data"),
        (lambda: Clients.of([[1], 5]), "The data of client 1: You gave data of type int"),
        (lambda: Clients.made_by(lambda client: [1], [1, 0]), "Client 1 of 2 without data"),
        (lambda: Clients.by_indices((X, Y), [[1], []]), "Client 1 of 2 without data"),
        (lambda: Clients.by_indices((X, Y), []), "There are no clients"),
        (lambda: Clients.by_indices((X, Y), [[1], [10]]), "Client 1 owns samples 10 to 10, but .* 0 to 9"),
        (lambda: Clients.by_indices((X, Y), [[1], [-1]]), "Client 1 owns samples -1"),
        (lambda: Clients.by_indices((X, Y), [[1, 2], [3, 1]]), "Sample 1 is owned by client 0 and again by client 1"),
        (lambda: Clients.by_indices((X, Y), [[1], [2.5]]), "indices of client 1 are float64"),
        (lambda: Clients.by_indices(as_source([1, 2]), [[0]]), "give the data that it was made of"),
        (lambda: Clients.by_label_skew((X, Y), Y[:5], 2, 1.0, 0), "5 labels for 10 samples"),
        (lambda: Clients.by_label_skew((X, Y), Y, 11, 1.0, 0), "num_clients=11, but there are 10 samples"),
        (lambda: Clients.by_label_skew((X, Y), Y, 2, 0.0, 0), "alpha=0.0"),
        (lambda: Clients.by_label_skew((X, Y), X, 2, 1.0, 0), "one label per sample"),
        (lambda: Clients.of([[1]]).data_of(1), "There is no client 1; there are 1"),
        (lambda: Clients.of([[1]]).data_of(-1), "There is no client -1"),
    ],
)
def test_what_cannot_work_is_said(make, words):
    with pytest.raises(SettingsError, match=words):
        make()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=80), st.floats(1e-4, 1e4), st.integers(0, 100), st.data())
def test_every_sample_is_dealt_once_and_evenly(labels, alpha, seed, data):
    num_clients = data.draw(st.integers(1, len(labels)))
    parts = label_skew(np.array(labels), num_clients, alpha, seed)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    sizes = {len(part) for part in parts}
    assert len(parts) == num_clients and max(sizes) - min(sizes) <= 1


def mean_entropy(alpha):
    """Of clients' labels, in nats: ln 10 = 2.30 where they are alike, 0 where each has one label."""
    labels = np.arange(20_000) % 10
    out = []
    for part in label_skew(labels, 100, alpha, 3):
        shares = np.bincount(labels[part], minlength=10) / len(part)
        out.append(-sum(s * np.log(s) for s in shares if s))
    return float(np.mean(out))


def test_a_smaller_alpha_makes_clients_less_alike():
    assert mean_entropy(1000.0) > 2.2 > mean_entropy(10.0) > 1.5 > mean_entropy(1.0) > mean_entropy(0.1)


def test_label_skew_is_frozen():
    """Another deal is another result of every run that was recorded: these numbers may not change."""
    parts = label_skew(np.arange(30) % 3, 5, 0.5, 7)
    assert [part.tolist() for part in parts] == [
        [0, 8, 15, 16, 18, 25],
        [1, 7, 10, 13, 19, 28],
        [2, 5, 6, 11, 17, 20],
        [3, 4, 22, 23, 26, 29],
        [9, 12, 14, 21, 24, 27],
    ]
    assert not np.array_equal(parts[0], label_skew(np.arange(30) % 3, 5, 0.5, 8)[0])
    assert [value.hex() for value in dirichlet(np.array([0.5, 2.0]), 1, 0)[0].tolist()] == [
        "0x1.5295fe805a549p-3",
        "0x1.ab5a805fe96aep-1",
    ]


@pytest.mark.parametrize("alphas", [(0.1, 0.1, 0.1), (0.3, 1.0, 4.0), (50.0, 50.0, 50.0)])
def test_dirichlet_draws_have_the_right_moments(alphas):
    alphas, total = np.array(alphas), sum(alphas)
    rows = dirichlet(alphas, 20_000, 1)
    np.testing.assert_allclose(rows.sum(1), 1, rtol=1e-12)
    mean, variance = alphas / total, alphas * (total - alphas) / (total * total * (total + 1))
    assert np.all(np.abs(rows.mean(0) - mean) < 5 * np.sqrt(variance / 20_000))
    np.testing.assert_allclose(rows.var(0), variance, rtol=0.06)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 7.0])
def test_gamma_draws_have_the_right_moments(alpha):
    draws = np.exp(_log_gammas(np.full(200_000, alpha), 5))
    fourth = 3 * alpha * (alpha + 2)
    assert abs(draws.mean() - alpha) < 5 * np.sqrt(alpha / 200_000)
    assert abs(((draws - alpha) ** 2).mean() - alpha) < 5 * np.sqrt((fourth - alpha**2) / 200_000)


def test_own_logarithms_and_exponentials_are_right():
    x = np.exp(np.linspace(-700, 700, 10_001))
    np.testing.assert_allclose(_log(x), np.log(x), rtol=1e-14, atol=1e-16)
    x = np.linspace(-700, 0, 10_001)
    np.testing.assert_allclose(_exp(x), np.exp(x), rtol=1e-12)
    assert _exp(np.array([-1e9]))[0] < 1e-300
