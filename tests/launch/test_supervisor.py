import signal
from pathlib import Path

import pytest


def test_workers_run_and_all_they_say_arrives(drive):
    end = drive("ordinary", 3)
    assert (end["code"], end["message"], end["num_workers"]) == (0, "", 3)
    told = [info for kind, info, _ in end["frames"] if kind == "progress"]
    assert sorted(info["rank"] for info in told) == [0, 1, 2]
    assert {info["forked"] for info in told} == {3}
    assert len({info["pid"] for info in told}) == 3
    assert ["finished", {"facts": {}}, 3_000_000] in end["frames"]


def test_nothing_is_left_after_a_run(drive):
    end = drive("ordinary", 3)
    assert end["same_descriptors"]
    assert end["children"] == ""
    assert drive.files() == []


def test_only_the_first_workers_prints_are_shown(drive):
    assert "worker 0 prints" in drive("ordinary")["printed"]
    assert "worker 1 prints" not in drive("ordinary")["printed"]


def test_an_error_in_one_worker_ends_the_run_with_the_users_lines(drive):
    end = drive("one_raises", 3)
    assert end["code"] == 1
    assert end["message"].count("ValueError: the second worker's error") == 1
    assert 'driver.py", line' in end["message"]
    assert "launching" not in end["message"], "frames of samestep are no help"
    assert "in worker 1;" in end["message"]
    assert end["same_descriptors"]
    assert end["children"] == ""


def test_unseen_prints_are_kept_after_a_failure_and_named(drive):
    end = drive("one_raises", 2)
    (kept,) = drive.files()
    assert kept.name == "worker-1.txt"
    assert (drive.folder / kept).read_text() == "worker 1 prints\n"
    assert str((drive.folder / kept).parent) in end["message"]


def test_the_same_error_from_all_workers_is_shown_once(drive):
    end = drive("all_raise", 2)
    assert end["message"].count("ValueError: everyone's error") == 1


def test_an_error_that_blames_a_peer_waits_for_the_cause(drive):
    end = drive("peer_first")
    assert "the cause" in end["message"]
    assert "is gone" not in end["message"]


def test_an_error_that_blames_a_peer_is_shown_if_there_is_no_other(drive):
    end = drive("only_peers")
    assert end["code"] == 1
    assert "samestep: worker 1 does not answer" in end["message"]


def test_wrong_settings_have_their_own_exit_code_only_before_the_run(drive):
    end = drive("wrong_settings")
    assert end["code"] == 2
    assert end["message"].count("\nsamestep: These settings clash.") == 1
    assert drive("wrong_use")["code"] == 1


@pytest.mark.parametrize(("body", "words"), [("killed", "SIGKILL"), ("crashed", "SIGSEGV"), ("os_exit", "exit code 7")])
def test_a_worker_that_dies_silently_is_named(drive, body, words):
    end = drive(body)
    assert end["code"] == 1
    assert end["message"].partition("samestep: ")[2].startswith("Worker 1 (pid ")
    assert words in end["message"]


def test_a_crash_in_native_code_is_told_with_the_users_line_and_its_stack_is_kept(drive):
    end = drive("crashed")
    line = 1 + Path(__file__).with_name("driver.py").read_text().splitlines().index(
        "        os.kill(os.getpid(), signal.SIGSEGV)"
    )
    assert f"native code crashed at driver.py:{line}: torch, or" in end["message"]
    assert f'driver.py", line {line}, in crashed\n    os.kill(' in end["message"]
    assert "launching" not in end["message"].partition("samestep: ")[0], "frames of samestep are no help"
    (kept,) = drive.files()
    assert "Fatal Python error: Segmentation fault" in (drive.folder / kept).read_text()
    assert end["same_descriptors"]


def test_exit_codes_of_the_script_are_honoured(drive):
    end = drive("exit_code")
    assert (end["code"], end["message"]) == (3, "")
    end = drive("exit_message")
    assert (end["code"], end["message"]) == (1, "good bye")
    assert drive("exit_all")["code"] == 0


def test_one_worker_that_leaves_alone_is_an_error(drive):
    end = drive("exit_one")
    assert end["code"] == 1
    assert "Worker 1 called sys.exit()" in end["message"]


def test_a_worker_that_ignores_sigterm_is_killed(drive):
    end = drive("stubborn")
    assert end["code"] == 1
    assert "the first error" in end["message"]


def test_the_rest_of_a_failed_fleet_may_tidy_up(drive):
    drive("tidies_up")
    assert "tidied" in map(str, drive.files())


def test_a_fleet_is_started_again_with_more_workers_if_the_script_wants_them(drive):
    end = drive("wants_three", 2)
    assert (end["code"], end["num_workers"]) == (0, 3)
    assert sorted(info["rank"] for _, info, _ in end["frames"]) == [0, 1, 2]


def test_workers_that_are_not_needed_may_leave(drive):
    end = drive("leaves", 3)
    assert (end["code"], end["message"]) == (0, "")


@pytest.mark.parametrize("body", ["abandons_child", "abandons_child_and_fails"])
def test_processes_that_workers_started_end_with_the_run(drive, body):
    end = drive(body, 1)
    assert [info for _, info, _ in end["frames"]], "no child was started"
    assert end["children"] == ""


def test_a_watcher_may_end_the_run(drive):
    end = drive("traced", 1)
    assert (end["code"], end["message"]) == (0, "")
    assert 5 <= len(end["frames"]) < 1000


def test_a_process_with_threads_does_not_fork(drive):
    assert "has 2; the others are called" in drive("never")["settings_error"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_to_the_supervisor_ends_all(drive, number, code):
    process = drive.start("sleeps", 2)
    printed = _read_pids(process, 2)
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert f'"code": {code}' in output, printed + output
    assert f"{number.name} ended the run" in output


def test_workers_die_with_their_supervisor(drive):
    process = drive.start("sleeps", 2)
    _read_pids(process, 2)
    process.kill()
    process.communicate(timeout=30)
    assert drive.is_gone_within(10)


def _read_pids(process, count):
    """Wait until workers are at work."""
    lines = []
    while sum(line.startswith("pid ") for line in lines) < count:
        line = process.stdout.readline()
        assert line, lines
        lines.append(line)
    return "".join(lines)


def notes(end):
    return [info["text"].removeprefix("samestep: ") for kind, info, _ in end["frames"] if kind == "note"]


def test_survivors_go_on_and_take_in_a_replacement(drive):
    end = drive("survived", 2)
    assert (end["code"], end["message"]) == (0, "")
    assert notes(end) == ["Worker 1 died (SIGKILL); its replicas moved to the other workers.", "Worker 1 is back."]
    assert ["finished", {"pending": 0}, 0] in end["frames"], "the order to join was taken back"
    assert end["same_descriptors"]
    assert end["children"] == ""


def test_replacements_that_fail_are_given_up(drive):
    end = drive("survived_alone", 2)
    assert (end["code"], end["message"]) == (0, "")
    assert notes(end)[1:] == ["None of 4 replacements of worker 1 came up, so the run goes on with 1 worker."]
    assert end["same_descriptors"]


def test_a_replacement_that_is_on_its_way_ends_with_the_run(drive):
    end = drive("survived_and_finished_first", 2)
    assert (end["code"], end["message"]) == (0, "")
    assert end["children"] == ""
    assert end["same_descriptors"]
