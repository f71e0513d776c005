import os
import time

from samestep.core.clock import PHASES as CLOCK_PHASES
from samestep.core.clock import Clock
from samestep.guarding.pulse import PHASES, Pulses


def test_what_a_forked_worker_notes_is_read():
    pulses = Pulses(3)
    pid = os.fork()
    if not pid:
        clock = Clock(pulses.of(1))
        clock.begin_step(41, True)
        clock.to("data")
        time.sleep(0.02)
        clock.to("update")
        clock.end_step()
        clock.begin_step(42, False)
        clock.begin_shard(42, 5)
        clock.to("compute")
        os._exit(0)
    os.waitpid(pid, 0)
    reading = pulses.read(1, stopped=True)
    assert (reading.rank, reading.beats, reading.phase) == (1, 3, "compute")
    assert (reading.step, reading.replica, reading.num_steps) == (42, 5, 1)
    assert 0.02 <= reading.step_seconds < 10
    assert reading.stopped and not reading.traced and not reading.begins
    for other in (0, 2):
        assert pulses.read(other).beats == 0
        assert pulses.read(other).phase == "outside"


def test_every_phase_of_the_clock_can_be_noted():
    pulses = Pulses(1)
    clock = Clock(pulses.of(0))
    for phase in CLOCK_PHASES:
        clock.to(phase)
        assert pulses.read(0).phase == phase
    assert set(CLOCK_PHASES) < set(PHASES)


def test_another_launch_call_begins_with_its_own_first_step():
    pulses = Pulses(1)
    clock = Clock(pulses.of(0))
    clock.begin_step(0, True)
    assert pulses.read(0).begins
    clock.end_step()
    assert pulses.read(0).num_steps == 1
    pulses.of(0).start()
    assert (pulses.read(0).num_steps, pulses.read(0).step_seconds, pulses.read(0).begins) == (0, 0.0, False)


def test_an_update_without_a_begun_step_is_no_step():
    pulses = Pulses(1)
    Clock(pulses.of(0)).end_step()
    assert pulses.read(0).num_steps == 0


def test_a_sign_of_life_costs_next_to_nothing():
    times = {}
    for name, clock in (("with", Clock(Pulses(1).of(0))), ("without", Clock())):
        fastest = float("inf")
        for _ in range(20):
            begin = time.perf_counter()
            for _ in range(1000):
                clock.to("compute")
            fastest = min(fastest, (time.perf_counter() - begin) / 1000)
        times[name] = fastest
    assert times["with"] - times["without"] < 2e-6
