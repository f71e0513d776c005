import os
import signal
import subprocess
import sys
import sysconfig
import time

import pytest

import samestep
from samestep.guarding import stack
from samestep.guarding.stack import StackFile, frames_of, line_in_loader, line_of_user, work_in

OWN = os.path.dirname(samestep.__file__)
LIB = sysconfig.get_path("stdlib")
TEXT = f"""Thread 0x00007f01 (most recent call first):
  File "/home/u/helper.py", line 3 in spin

Current thread 0x00007f02 (most recent call first):
  File "{LIB}/queue.py", line 171 in get
  File "{LIB}/site-packages/torch/nn/modules/module.py", line 1751 in _call_impl
  File "/home/u/model.py", line 12 in forward
  File "{OWN}/loop/step.py", line 130 in _play
  File "/home/u/train.py", line 40 in main
  File "<frozen runpy>", line 88 in _run_code
"""


def test_the_users_innermost_line_of_the_main_thread():
    assert line_of_user(TEXT) == "model.py:12"
    assert [frame.function for frame in frames_of(TEXT)][-2:] == ["main", "_run_code"]
    assert line_of_user("") == ""


def test_the_line_in_a_loader_is_not_that_of_the_worker_it_was_forked_from():
    fork = f'  File "{OWN}/data/loader.py", line 149 in _serve\n  File "/home/u/train.py", line 40 in main\n'
    head = "Current thread 0x1 (most recent call first):\n"
    assert line_in_loader(head + '  File "/home/u/data.py", line 7 in __getitem__\n' + fork) == "data.py:7"
    assert line_in_loader(head + f'  File "{LIB}/multiprocessing/connection.py", line 379 in _recv\n' + fork) == ""
    assert line_in_loader(TEXT) == ""


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("torch/_dynamo/convert_frame.py", "compiling"),
        ("torch/_inductor/graph.py", "compiling"),
        ("torch/_inductor/compile_fx.py", ""),  # of which only some functions compile
        ("torch/_dynamo/eval_frame.py", ""),  # also on the stack while compiled code runs
    ],
)
def test_compiling_is_work(path, what):
    assert work_in(TEXT) == ""
    assert work_in(TEXT + f'  File "{LIB}/site-packages/{path}", line 1 in f\n') == what


def test_compiling_a_backward_pass_is_work():
    call = f'  File "{LIB}/site-packages/torch/_functorch/_aot_autograd/runtime_wrappers.py", line 2854 in '
    assert work_in(TEXT + call + "get_or_compile\n") == "compiling"
    assert work_in(TEXT + call + "backward\n") == ""


def test_someone_who_sits_at_a_debugger_is_left_alone():
    assert work_in(TEXT + f'  File "{LIB}/bdb.py", line 90 in trace_dispatch\n') == "in a debugger"


def child(act):
    """Fork a child that has the handler and then does something."""
    file = StackFile(0)
    pid = os.fork()
    if not pid:
        file.enter()
        act()
        os._exit(0)
    return pid, file


def end(pid, file):
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    file.close()


def wait_until(is_true):
    deadline = time.monotonic() + 10
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_process_that_is_asked_shows_its_stack_each_time():
    pid, file = child(lambda: time.sleep(60))
    try:
        wait_until(lambda: stack._catches(pid))
        for _ in range(2):
            assert line_of_user(file.ask(pid)).startswith("test_stack.py:")
        assert file.ask(pid).count("most recent call first") == 1
        assert stack.state_of(pid) == "S", "it sleeps on"
    finally:
        end(pid, file)


def test_a_stopped_process_shows_where_it_stands():
    pid, file = child(lambda: os.kill(os.getpid(), signal.SIGSTOP))
    try:
        wait_until(lambda: stack.state_of(pid) == "T")
        assert file.ask(pid) == ""
        assert line_of_user(file.ask(pid, stopped=True)).startswith("test_stack.py:")
    finally:
        end(pid, file)


def test_a_process_that_works_uses_time_and_a_stopped_one_does_not():
    def work():
        while True:
            pass

    pid, file = child(work)
    try:
        wait_until(lambda: stack.ticks_of(pid) > 5)
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: stack.state_of(pid) == "T")
        used = stack.ticks_of(pid)
        time.sleep(0.1)
        assert stack.ticks_of(pid) == used
    finally:
        end(pid, file)
    assert stack.ticks_of(pid) == 0
    assert stack.state_of(pid) == ""


def test_a_process_without_the_handler_is_not_sent_the_signal():
    process, file = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]), StackFile(0)
    try:
        assert file.ask(process.pid) == ""
        assert process.poll() is None
        assert process.pid in stack.children_of(os.getpid())
    finally:
        process.kill()
        process.wait()
        file.close()
