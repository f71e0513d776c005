import signal

import pytest

from samestep.errors import IntegrityError
from samestep.launching.failure import Failure
from samestep.launching.verdict import Action, Verdict

KILLED = signal.SIGKILL
EXITED_7 = 7 << 8


def failure(message, *, rank=0, of_peer=False, code=1):
    return Failure(kind="ValueError", message=message, rank=rank, of_peer=of_peer, code=code)


def test_a_run_in_which_nothing_happens_is_good():
    verdict = Verdict(2)
    assert verdict.died(0, 11, 0, told=True) is Action.GO_ON
    outcome = verdict.outcome()
    assert (outcome.code, outcome.message, outcome.has_failed, outcome.wants) == (0, "", False, None)


def test_the_first_cause_is_shown_not_the_first_complaint():
    verdict = Verdict(3)
    assert verdict.failed(failure("worker 1 is gone", of_peer=True)) is Action.END_SOON
    assert verdict.failed(failure("cause", rank=1)) is Action.END_NOW
    assert verdict.failed(failure("later", rank=2)) is Action.END_NOW
    message = verdict.outcome().message
    assert "worker 1;" in message
    assert "later" not in message


def test_workers_with_the_same_error_are_named_together():
    verdict = Verdict(3)
    for rank in (2, 0):
        verdict.failed(failure("boom", rank=rank))
    verdict.failed(failure("other", rank=1))
    assert "in workers 0 and 2;" in verdict.outcome().message


def test_a_death_by_signal_is_a_failure_even_after_the_last_word():
    verdict = Verdict(2)
    assert verdict.died(1, 12, KILLED, told=True) is Action.END_NOW
    assert "killed by SIGKILL" in verdict.outcome().message


def test_a_worker_that_ends_without_a_word_failed():
    verdict = Verdict(2)
    assert verdict.died(1, 12, EXITED_7, told=False) is Action.END_NOW
    assert verdict.outcome().code == 1
    verdict = Verdict(2)
    assert verdict.died(1, 12, 0, told=False) is Action.END_NOW
    assert verdict.outcome().code == 1


def test_the_first_workers_exit_code_wins():
    verdict = Verdict(2)
    verdict.left(1, {"code": 4, "message": "", "inside": True})
    verdict.left(0, {"code": 5, "message": "bye", "inside": True})
    outcome = verdict.outcome()
    assert (outcome.code, outcome.message, outcome.has_failed) == (5, "bye", False)


def test_leaving_quietly_outside_of_the_run_hurries_nobody():
    assert Verdict(2).left(1, {"code": 0, "message": "", "inside": False}) is Action.GO_ON


def test_leaving_in_the_middle_is_a_failure_only_if_others_stay():
    verdict = Verdict(2)
    assert verdict.left(1, {"code": 0, "message": "", "inside": True}) is Action.END_SOON
    assert verdict.outcome().code == 0
    assert verdict.waited() is Action.END_NOW
    assert verdict.outcome().code == 1


def test_a_signal_outranks_what_it_caused():
    verdict = Verdict(2)
    assert verdict.interrupted(signal.SIGINT) is Action.END_NOW
    verdict.interrupted(signal.SIGTERM)
    verdict.failed(failure("broken pipe"))
    outcome = verdict.outcome()
    assert outcome.code == 130
    assert "SIGINT" in outcome.message


def test_another_number_of_workers_is_wanted_only_from_a_healthy_run():
    verdict = Verdict(2)
    assert verdict.wants(3) is Action.END_NOW
    assert verdict.outcome().wants == 3
    verdict.failed(failure("boom"))
    assert verdict.outcome().wants is None
    assert verdict.outcome().code == 1


def test_a_hung_worker_is_not_said_to_have_been_killed_by_somebody():
    verdict = Verdict(2)
    verdict.hung(1, "Worker 1 (pid 11) hung in step 3, at train.py:40. It made no progress, so it was killed.")
    assert verdict.died(1, 11, KILLED, told=False) is Action.END_NOW
    outcome = verdict.outcome()
    assert outcome.died == "Worker 1 (pid 11) hung in step 3, at train.py:40. It made no progress, so it was killed."
    assert outcome.message == f"samestep: {outcome.died}"
    assert (outcome.code, outcome.has_failed) == (1, True)


def test_the_first_signal_lets_the_step_be_finished_the_second_does_not():
    verdict = Verdict(2)
    assert verdict.interrupted(signal.SIGTERM, can_finish=True) is Action.FINISH
    assert verdict.halted(None) is Action.END_SOON
    outcome = verdict.outcome()
    assert (outcome.code, outcome.ended_by, outcome.wants) == (143, signal.SIGTERM, None)
    verdict = Verdict(2)
    assert verdict.interrupted(signal.SIGINT, can_finish=True) is Action.FINISH
    assert not verdict.is_hurried
    assert verdict.interrupted(signal.SIGINT, can_finish=True) is Action.END_AT_ONCE
    assert verdict.is_hurried
    assert verdict.outcome().code == 130


def test_a_run_that_ends_by_itself_in_its_last_step_was_not_stopped():
    verdict = Verdict(1)
    verdict.interrupted(signal.SIGINT, can_finish=True)
    verdict.died(0, 11, 0, told=True)
    outcome = verdict.outcome()
    assert (outcome.code, outcome.ended_by, outcome.message) == (0, None, "")
    verdict.failed(failure("the user's own error"))
    assert verdict.outcome().code == 1


def test_workers_that_the_same_signal_killed_are_no_failure():
    verdict = Verdict(2)
    verdict.interrupted(signal.SIGTERM, can_finish=True)
    verdict.died(1, 12, signal.SIGTERM, told=False)
    verdict.failed(failure("worker 1 is gone", of_peer=True))
    outcome = verdict.outcome()
    assert (outcome.code, outcome.has_failed, outcome.died) == (143, False, None)


def test_to_scale_starts_again_unless_a_signal_came():
    verdict = Verdict(2)
    assert verdict.halted(3) is Action.END_SOON
    assert (verdict.outcome().wants, verdict.outcome().code) == (3, 0)
    verdict.interrupted(signal.SIGINT, can_finish=True)
    assert (verdict.outcome().wants, verdict.outcome().code) == (None, 130)


def test_an_error_that_may_pass_gets_no_second_try_when_the_run_is_to_end():
    verdict = Verdict(1)
    verdict.failed(Failure(kind="OSError", message="busy", rank=0, may_pass=True))
    assert verdict.outcome().died
    verdict = Verdict(1)
    verdict.interrupted(signal.SIGINT, can_finish=True)
    verdict.failed(Failure(kind="OSError", message="busy", rank=0, may_pass=True))
    outcome = verdict.outcome()
    assert (outcome.code, outcome.died, outcome.has_failed) == (1, None, True)


def test_a_flipped_bit_is_told_in_its_own_words():
    verdict = Verdict(2)
    for rank in range(2):
        verdict.failed(Failure.of(IntegrityError("A bit flipped."), rank))
    outcome = verdict.outcome()
    assert outcome.died == "A bit flipped." and outcome.error == "IntegrityError: A bit flipped."


def test_the_same_error_is_the_same_in_another_process():
    errors = []
    for pid in (311, 40_017):
        verdict = Verdict(2)
        verdict.failed(Failure.of(IntegrityError(f"Worker 1 (host a, pid {pid}, cpu) computes wrong."), 1))
        outcome = verdict.outcome()
        assert outcome.died is not None and f"pid {pid}" in outcome.died
        errors.append(outcome.error)
    assert errors[0] == errors[1] and "Worker 1" in errors[0]


@pytest.mark.parametrize(("text", "told"), [("", "a MemoryError."), ("of 1 GiB", "a MemoryError: of 1 GiB.")])
def test_an_error_without_a_text_is_named_alone(text, told):
    verdict = Verdict(2)
    verdict.failed(Failure(kind="MemoryError", message=text, rank=1, may_pass=True))
    assert verdict.outcome().died == f"Worker 1 had {told}"
