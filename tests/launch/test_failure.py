import json

import pytest

from samestep.errors import DataError, PeerError, SettingsError
from samestep.launching.channel import channel
from samestep.launching.failure import Failure
from samestep.launching.payload import by_value, from_value, script_of
from samestep.settings.options import Options


def failure_of(act):
    with pytest.raises(Exception) as caught:
        act()
    return Failure.of(caught.value, rank=2)


def test_frames_of_samestep_are_left_out_of_a_users_error():
    def users():
        raise KeyError("users")

    class Sock:
        def sendall(self, _):
            users()

    sender, receiver = channel()
    receiver.close()
    sender.close()
    sender._connection = Sock()
    failure = failure_of(lambda: sender.send("kind"))
    assert "in users" in failure.traceback
    assert "channel.py" not in failure.traceback
    assert failure.text().endswith("samestep: the error above happened in worker 2; the run has ended.")


def test_an_error_of_our_own_code_keeps_all_frames():
    sender, receiver = channel()
    receiver.close()
    failure = failure_of(lambda: sender.send("kind", blob=b"x" * 10_000_000))
    sender.close()
    assert "channel.py" in failure.traceback


def test_samesteps_own_errors_show_the_line_that_called_it():
    failure = failure_of(lambda: Options(workers=0).check())
    assert failure.of_samestep
    lines = failure.text().splitlines()
    assert "test_failure.py" in lines[0]
    assert "options.py" not in failure.text()
    assert lines[-1].startswith("samestep: You set workers=0")
    assert "Traceback" not in failure.text()


def test_the_users_cause_comes_first():
    def act():
        try:
            {}["sample"]
        except KeyError as error:
            raise DataError("Sample 7 could not be read.") from error

    text = failure_of(act).text()
    assert text.index("KeyError: 'sample'") < text.index("samestep: Sample 7 could not be read.")


def test_a_failure_crosses_a_channel():
    failure = failure_of(lambda: (_ for _ in ()).throw(PeerError("gone")))
    assert failure.of_peer
    assert Failure(**json.loads(json.dumps(failure.to_dict()))) == failure


def test_an_unsendable_variable_is_named():
    import threading

    lock = threading.Lock()
    with pytest.raises(SettingsError, match=r"it uses `lock` \(_thread.lock\)"):
        by_value(lambda run: lock)


def test_a_function_travels_with_what_it_closes_over():
    offset = 4
    assert from_value(by_value(lambda value: value + offset))(3) == 7


def test_a_function_of_another_module_is_not_of_the_script():
    assert script_of(test_an_unsendable_variable_is_named) is None
