"""What the coordinator tells the user, and what it does at single events; its simulation plays the rest."""

import signal

from samestep.core.worker import Wish
from samestep.launching.channel import Frame
from samestep.launching.coordinator import Coordinator, Setup
from samestep.launching.events import Exited, Facts, Heard, Hung, Signalled
from samestep.launching.instructions import End, Fork, Join, Kill, MarkDead, Note, StartAgain, Terminate
from samestep.launching.restarts import Restarts

KILLED = int(signal.SIGKILL)


class Fleet:
    """A fleet in the middle of its run."""

    def __init__(self, num_workers=3, survivors_go_on=True):
        setup = Setup(num_workers=num_workers, has_snapshots=True, has_orders=True, survivors_go_on=survivors_go_on)
        self.coordinator = Coordinator(setup, Restarts())
        self.coordinator.begin()
        self.orders = 0
        self.says(0, "seated", num_workers=num_workers, can_scale=True)

    def tell(self, event, num_calls=5):
        return self.coordinator.take(event, Facts(now=1.0, num_calls=num_calls, orders=self.orders))

    def says(self, slot, kind, generation=0, /, **info):
        return self.tell(Heard(slot, generation, Frame(kind, info)))

    def dies(self, slot, generation=0, status=KILLED, num_calls=5):
        return self.tell(Exited(slot, generation, 10 + slot, status), num_calls)


def texts(out):
    return [instruction.text for instruction in out if isinstance(instruction, Note)]


def test_a_death_is_told_once_the_others_go_on():
    fleet = Fleet()
    assert fleet.dies(1, status=7 << 8) == [MarkDead(1)]
    told = fleet.says(0, "mended", first=0, members=[0, 2], dead=[1], step=5)
    words = "samestep: Worker 1 died (exit code 7); its replicas moved to the other workers."
    assert told == [Note(words), Fork(1, 1, joins=True)]
    assert fleet.says(1, "seated", 1) == [], "it only replays"
    assert fleet.says(1, "ready", 1, slot=1, generation=1) == [Join((1,))]
    back = fleet.says(0, "joined", members=[0, 1, 2], step=6)
    assert back == [Join(()), Note("samestep: Worker 1 is back.")]


def test_a_hung_worker_is_killed_then_marked_and_told_with_all_that_is_known():
    fleet = Fleet()
    assert fleet.tell(Hung(2, 0, "Worker 2 hung in step 3. Its stack is in x.")) == [Kill(2)]
    assert fleet.dies(2) == [MarkDead(2)]
    told = fleet.says(0, "mended", first=0, members=[0, 1], dead=[2], step=5)
    assert texts(told) == [
        "samestep: Worker 2 hung in step 3. Its stack is in x. Its replicas moved to the other workers."
    ]


def test_an_answer_that_does_not_know_of_a_later_death_is_waited_out():
    fleet = Fleet(4)
    fleet.dies(1)
    fleet.dies(0)
    assert fleet.says(2, "mended", first=2, members=[0, 2, 3], dead=[1], step=5) == []
    told = fleet.says(2, "mended", first=2, members=[2, 3], dead=[0, 1], step=5)
    assert [i for i in told if isinstance(i, Fork)] == [Fork(0, 1, True), Fork(1, 1, True)]


def test_where_nobody_can_go_on_all_start_again():
    fleet = Fleet()
    fleet.dies(1)
    told = fleet.says(2, "lost", slot=2)
    assert {Kill(0), Kill(2)} <= {i for i in told if isinstance(i, Kill)}
    fleet.dies(0)
    *_, note, again = fleet.dies(2)
    words = "Worker 1 (pid 11) was killed by SIGKILL. All workers start again from the newest state."
    assert note == Note(f"samestep: {words}")
    assert isinstance(again, StartAgain) and again.num_workers == 3


def test_a_fleet_that_has_recorded_nothing_of_its_own_is_not_survived():
    fleet = Fleet()
    assert Terminate(0) in fleet.dies(1, num_calls=0)


def test_an_order_to_leave_ends_who_is_on_the_way():
    for order in (Wish.STOP, Wish.SCALE):
        fleet = Fleet()
        fleet.dies(1)
        fleet.says(0, "mended", first=0, members=[0, 2], dead=[1], step=5)
        fleet.orders = order
        assert fleet.says(0, "progress")[-1] == Kill(1)
        assert fleet.dies(1, 1) == []
    fleet = Fleet()
    fleet.dies(1)
    fleet.says(0, "mended", first=0, members=[0, 2], dead=[1], step=5)
    fleet.says(1, "ready", 1)
    assert fleet.tell(Signalled(signal.SIGINT))[-1] == Join(()), "it may be one of them already, so it lives"


def test_without_survivors_that_go_on_a_death_ends_the_fleet():
    fleet = Fleet(2, survivors_go_on=False)
    out = fleet.dies(1)
    assert Terminate(0) in out and Kill(0) in out
    assert not any(isinstance(i, MarkDead | End) for i in out)
    assert isinstance(fleet.dies(0)[-1], StartAgain)
