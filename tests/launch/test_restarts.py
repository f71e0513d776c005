"""Which deaths a run survives."""

from samestep.launching.restarts import IN_VAIN, Restarts


def test_a_run_that_gets_on_is_always_started_again():
    restarts = Restarts()
    assert all(restarts.allow(calls) for calls in range(1, 100))
    assert restarts.count == 99 and not restarts.in_vain


def test_a_run_that_gets_no_further_ends():
    restarts = Restarts()
    assert restarts.allow(5)
    assert [restarts.allow(5) for _ in range(IN_VAIN)] == [True] * (IN_VAIN - 1) + [False]
    assert restarts.in_vain


def test_progress_in_between_counts():
    restarts = Restarts()
    for calls in range(1, 20):
        assert restarts.allow(calls) and restarts.allow(calls)


def test_deaths_before_the_first_call_end_it():
    restarts = Restarts()
    assert [restarts.allow(0) for _ in range(IN_VAIN)] == [True] * (IN_VAIN - 1) + [False]


def test_an_error_gets_one_more_try_at_each_place():
    restarts = Restarts()
    assert restarts.allow(5, "OSError: gone")
    assert restarts.allow(7, "OSError: gone"), "another place"
    assert restarts.allow(7, "OSError: elsewhere")
    assert not restarts.came_again
    assert not restarts.allow(8, "OSError: elsewhere"), "a call more or less is the same place"
    assert restarts.came_again
    assert not restarts.in_vain, "the error itself says enough"


def test_an_error_before_the_first_call_is_told_at_once():
    assert not Restarts().allow(0, "OSError: no such file")
