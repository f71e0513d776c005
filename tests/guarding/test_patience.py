"""Who is hung: made-up readings, half a second apart."""

import math
from dataclasses import replace

import pytest

from samestep.guarding.patience import Patience
from samestep.guarding.pulse import Reading

STEP = Reading(rank=0, beats=100, phase="compute", step=20, replica=3, step_seconds=0.1, num_steps=20)


def silent_for(seconds, *readings, patience=None, every=0.5):
    """The rank found hung once these readings have stayed the same for so many seconds; None if none was."""
    patience = patience if patience is not None else Patience()
    for look in range(round(seconds / every) + 1):
        found = patience.look(1000 + look * every, readings)
        if found is not None:
            return found.rank
    return None


def test_a_silent_worker_is_hung_after_the_floor():
    assert silent_for(5.0, STEP) is None
    assert silent_for(5.5, STEP) == 0


@pytest.mark.parametrize("phase", ["compute", "data", "update"])
def test_everyone_waits_for_one(phase):
    waiting = [replace(STEP, rank=rank, phase="wait") for rank in (0, 1, 3)]
    assert silent_for(60, *waiting, replace(STEP, rank=2, phase=phase)) == 2


def test_whoever_waits_for_others_is_never_hung():
    waiting = replace(STEP, phase="wait")
    patience = Patience()
    for look in range(200):
        at_work = replace(STEP, rank=1, beats=look)
        assert patience.look(look * 0.5, [waiting, at_work]) is None


@pytest.mark.parametrize("phase", ["other", "outside", "wait"])
def test_long_work_outside_of_a_step_is_never_a_hang(phase):
    assert silent_for(3600, replace(STEP, phase=phase)) is None


@pytest.mark.parametrize("phase", ["other", "outside", "wait", "compute"])
def test_a_stopped_worker_is_hung_after_a_second_wherever_it_is(phase):
    others = replace(STEP, rank=1, phase="wait")
    assert silent_for(0.5, replace(STEP, phase=phase, stopped=True), others) is None
    assert silent_for(1.0, replace(STEP, phase=phase, stopped=True), others) == 0


def test_the_second_begins_when_it_is_stopped():
    patience = Patience()
    silent_for(4.5, STEP, patience=patience)
    for pause in (1005.0, 1006.0):
        assert patience.look(pause, [replace(STEP, stopped=True)]) is None, "a short stop in a long shard is no hang"
        if pause == 1005.0:
            patience.spare(0)
            patience.look(1005.5, [STEP])
    assert patience.look(1006.5, [replace(STEP, stopped=True)]) is None
    assert patience.look(1007.0, [replace(STEP, stopped=True)]).rank == 0


@pytest.mark.parametrize("moved", ["ticks", "beats"])
def test_a_worker_that_is_stopped_and_let_go_in_turn_is_slow_not_stopped(moved):
    patience = Patience()
    for look in range(200):
        paused = replace(STEP, stopped=True, **{moved: 100 + look // 2})
        assert patience.look(look * 0.5, [paused]) is None


def test_workers_that_wake_after_their_supervisor_are_not_stopped():
    patience, stopped = Patience(), replace(STEP, stopped=True)
    patience.look(1000.0, [STEP])
    assert patience.look(1000.5, [stopped]) is None, "the whole run is being suspended"
    assert patience.look(5000.0, [stopped]) is None, "it is let go, one process after the other"
    assert patience.look(5000.5, [STEP]) is None


def test_a_worker_in_a_debugger_is_not_hung():
    assert silent_for(3600, replace(STEP, traced=True)) is None


def test_a_long_step_is_judged_by_the_usual_one():
    for times, found in ((7.9, None), (8.1, 0)):
        assert silent_for(2.0 * times, replace(STEP, step_seconds=2.0), every=0.1) == found


def test_one_long_step_does_not_blunt_the_rule_for_those_after_it():
    patience = Patience()
    for number in range(1, 30):
        reading = replace(STEP, beats=number, num_steps=number, step_seconds=60 if number == 10 else 0.1)
        assert patience.look(number, [reading]) is None
    assert silent_for(5.5, replace(reading, beats=99), patience=patience) == 0


def test_steps_that_become_longer_are_not_hangs():
    patience = Patience()
    silent_for(1, replace(STEP, step_seconds=0.01), patience=patience)
    longer = replace(STEP, beats=200, num_steps=21, step_seconds=4.0)
    assert silent_for(31, longer, patience=patience) is None


def test_the_first_step_of_a_run_may_take_any_time():
    first = replace(STEP, num_steps=0, step_seconds=0.0)
    assert silent_for(3600, first) is None
    assert silent_for(1, replace(first, stopped=True)) == 0


def test_the_first_step_of_a_later_fleet_may_take_twelve_times_as_long():
    patience = Patience()
    silent_for(1, STEP, patience=patience)
    patience.begin()
    first = replace(STEP, num_steps=0, step_seconds=0.0)
    assert silent_for(60, first, patience=patience) is None
    patience.begin()
    assert silent_for(61, first, patience=patience) == 0


def test_data_that_is_opened_anew_may_take_twelve_times_as_long():
    opening = replace(STEP, begins=True, phase="data")
    assert silent_for(60, opening) is None
    assert silent_for(61, opening) == 0
    assert silent_for(6, replace(opening, phase="compute")) == 0


def test_another_training_in_the_same_script_begins_anew():
    patience = Patience()
    silent_for(1, STEP, patience=patience)
    patience.forget()
    assert silent_for(3600, replace(STEP, num_steps=0, step_seconds=0.0), patience=patience) is None
    silent_for(1, STEP, patience=patience)
    patience.look(2000, [replace(STEP, num_steps=0, step_seconds=0.0)])
    assert list(patience._steps) == [0.1], "counting anew is no step"


def test_a_pause_of_the_supervisor_itself_is_no_ones_hang():
    patience = Patience()
    patience.look(0, [STEP])
    assert patience.look(3600, [STEP]) is None, "the machine slept"
    assert patience.silence(0) <= 1


def test_a_sign_of_life_and_a_pardon_begin_anew():
    patience = Patience()
    silent_for(4.5, STEP, patience=patience)
    patience.look(1005, [replace(STEP, beats=101)])
    assert patience.silence(0) == 0
    silent_for(4.5, STEP, patience=patience)
    patience.spare(0)
    assert patience.silence(0) == 0


def test_of_two_the_one_that_is_silent_for_longer_is_named():
    patience = Patience()
    for look in range(20):
        second = replace(STEP, rank=1, beats=min(look, 4))
        found = patience.look(look * 0.5, [second, STEP])
        if found is not None:
            break
    assert found.rank == 0


def test_the_users_own_limit():
    assert silent_for(1.5, STEP, patience=Patience(1.0)) == 0
    assert silent_for(30, STEP, patience=Patience(60.0)) is None
    assert silent_for(30, replace(STEP, stopped=True), patience=Patience(60.0, stopped=60.0)) is None
    assert silent_for(3600, STEP, replace(STEP, rank=1, stopped=True), patience=Patience(0)) is None


def test_a_lone_worker_is_judged_alike():
    assert silent_for(math.ceil(8 * 0.1) + 5, STEP) == 0
