"""Faults on purpose: each strikes when it is due, whom it may, and is measured alone."""

import random
import signal

import pytest

from samestep.launching.injector import KINDS, Fault, Injector, plan


class Worker:
    def __init__(self, rank, is_alive=True):
        self.rank, self.is_alive, self.got = rank, is_alive, []

    def send_signal(self, number):
        self.got.append(number)


class Run:
    """A made-up run: how many calls it has recorded."""

    def __init__(self, faults):
        self.calls = 0
        self.injector = Injector(faults, 0.1, lambda: self.calls, random.Random(0))


def test_a_fault_waits_for_its_call_and_its_instant():
    run, workers = Run([Fault("kill", 3, 0.5)]), [Worker(0), Worker(1)]
    assert run.injector.poll(0.0, workers) is None and not run.injector.strikes
    run.calls = 3
    run.injector.poll(1.0, workers)
    run.injector.poll(1.04, workers)
    assert not run.injector.strikes
    run.injector.poll(1.05, workers)
    (strike,) = run.injector.strikes
    assert sum(len(w.got) for w in workers) == 1 and workers[strike.ranks[0]].got == [signal.SIGKILL]


def test_it_is_over_when_a_new_call_is_recorded():
    run, workers = Run([Fault("kill", 0, 0.0), Fault("abort", 0, 0.0)]), [Worker(0)]
    run.injector.poll(1.0, workers)
    assert workers[0].got == [signal.SIGKILL]
    run.calls = 5
    assert run.injector.poll(1.5, workers) is None, "nobody has seen the death yet"
    run.injector.ended(2.0)
    run.injector.ended(9.0)
    found = run.injector.poll(3.0, workers)
    assert (found.noticed_after, found.recovered_after) == (1.0, 2.0)
    run.injector.poll(4.0, workers)
    assert workers[0].got == [signal.SIGKILL, signal.SIGABRT]
    run.injector.ended(5.0)
    assert run.injector.poll(6.0, workers) is None, "no new call since"


def test_the_dead_are_left_alone():
    dead, alive = Worker(0, is_alive=False), Worker(1)
    run = Run([Fault("kill all", 0, 0.0)])
    run.injector.poll(1.0, [dead])
    assert not run.injector.strikes
    run.injector.poll(2.0, [dead, alive])
    assert not dead.got and alive.got == [signal.SIGKILL]


@pytest.mark.parametrize("seed", range(20))
def test_a_plan_has_each_fault_at_a_call_of_its_own(seed):
    faults = plan(20, 50, random.Random(seed))
    calls = [fault.at_call for fault in faults]
    assert calls == sorted(set(calls)) and len(calls) == 20 and calls[0] >= 0 and calls[-1] < 49
    assert all(fault.kind in KINDS and 0 <= fault.share < 1 for fault in faults)
    assert faults == plan(20, 50, random.Random(seed))
