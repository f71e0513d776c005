"""Any `threshold` shares give the secret back; fewer fit any other secret as well."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samestep.errors import SettingsError
from samestep.federated import sharing
from samestep.federated.sharing import PRIME, num_coins, recover, share

secrets = st.binary(min_size=32, max_size=32)


@settings(max_examples=50, deadline=None)
@given(secrets, st.lists(st.integers(0, 10**6), min_size=1, max_size=12, unique=True), st.data())
def test_any_threshold_of_shares_gives_the_secret(secret, holders, data):
    threshold = data.draw(st.integers(1, len(holders)))
    coins = data.draw(st.binary(min_size=num_coins(threshold), max_size=num_coins(threshold)))
    shares = share(secret, holders, threshold, coins)
    left = data.draw(st.permutations(holders))[: data.draw(st.integers(threshold, len(holders)))]
    assert recover({holder: shares[holder] for holder in left}, threshold) == secret
    with pytest.raises(ValueError):
        recover({holder: shares[holder] for holder in left[: threshold - 1]}, threshold)


def test_one_share_too_few_fits_every_secret():
    """Two of three: for one share and any secret there are coins that give that share."""
    mine = share(b"a" * 32, [0, 1, 2], 2, bytes(range(80)))[1]
    for other in (b"b" * 32, bytes(32)):
        slope = (mine - int.from_bytes(other, "little")) * pow(2, -1, PRIME) % PRIME
        assert share(other, [0, 1, 2], 2, slope.to_bytes(80, "little"))[1] == mine


def test_a_wrong_share_is_not_taken_for_a_secret():
    shares = share(b"a" * 32, range(5), 3, bytes(range(160)))
    shares[1] = shares[1] * 7 % PRIME
    with pytest.raises(ValueError, match="not of one secret"):
        recover(shares, 3)


def test_a_planted_zero_place_is_found(monkeypatch):
    """The share at place 0 is the secret itself: no holder may stand there."""
    assert all(
        value != int.from_bytes(b"a" * 32, "little")
        for value in share(b"a" * 32, range(9), 3, bytes(range(160))).values()
    )
    monkeypatch.setattr(sharing, "_at", lambda place, coefficients, constant: constant)
    assert set(share(b"a" * 32, range(9), 3, bytes(range(160))).values()) == {int.from_bytes(b"a" * 32, "little")}


@pytest.mark.parametrize("threshold", [0, 4])
def test_a_threshold_that_cannot_be_met_is_refused(threshold):
    with pytest.raises(SettingsError, match=f"shared among 3 clients cannot take {threshold}"):
        share(bytes(32), range(3), threshold, b"")
