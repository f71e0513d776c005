"""Orders: words that the supervisor writes and workers read."""

from samestep.core.worker import Wish
from samestep.launching.orders import MOST_SLOTS, Orders


def test_who_is_to_be_taken_in_stands_beside_other_orders():
    orders = Orders()
    orders.give(Wish.SCALE)
    orders.joining((0, 3, MOST_SLOTS - 1))
    assert orders.pending() == Wish.SCALE | Wish.JOIN
    assert orders.joiners() == (0, 3, MOST_SLOTS - 1)
    orders.joining((3,))
    assert orders.joiners() == (3,)
    orders.joining(())
    assert (orders.pending(), orders.joiners()) == (Wish.SCALE, ())


def test_a_new_fleet_takes_nobody_in_but_obeys_what_was_ordered():
    orders = Orders()
    orders.give(Wish.STOP)
    orders.joining((1,))
    orders.end()
    orders.reached()
    orders.begin()
    assert (orders.pending(), orders.joiners()) == (Wish.STOP, ())
    assert not orders.is_ending and not orders.is_reached
