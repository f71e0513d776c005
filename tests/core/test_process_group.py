"""How a process group begins, ends, and misses others; that it is a group is held by test_group_contract.py."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from samestep.core.process_group import ProcessGroup
from samestep.core.worker import Worker
from samestep.errors import PeerError, SettingsError, UsageError


def shares_the_default_group(bare) -> list[str]:
    rank, size = bare.worker.rank, bare.worker.size
    dist.init_process_group("gloo", init_method=bare.meeting, rank=rank, world_size=size)
    with pytest.raises(UsageError, match=r"Use ProcessGroup\(worker\)"):
        ProcessGroup.join(bare.worker, init_method=bare.meeting)
    with pytest.raises(SettingsError, match=f"rank {rank} of {size + 1}"):
        ProcessGroup(Worker(rank=rank, size=size + 1))
    group = ProcessGroup(bare.worker)
    replies = group.exchange(b"%d" % rank)
    assert group.post(b"%d" % rank, [1] * size)() == replies
    group.close()
    # The caller's own group goes on.
    total = torch.tensor([rank + 1])
    dist.all_reduce(total)
    assert total.item() == size * (size + 1) // 2
    dist.destroy_process_group()
    return [reply.decode() for reply in replies]


def test_a_default_group_of_the_callers_is_used_and_left_alone(fleet):
    assert fleet.play(shares_the_default_group, "bare", 2) == [["0", "1"]] * 2


def nobody_else_comes(bare) -> str:
    with pytest.raises(PeerError, match="not all came") as caught:
        ProcessGroup.join(Worker(rank=0, size=2), init_method=bare.meeting, timeout_seconds=1)
    assert caught.value.__cause__ is not None
    assert not dist.is_initialized()
    return str(caught.value)


def test_joining_alone_ends_with_a_peer_error(fleet):
    (message,) = fleet.play(nobody_else_comes, "bare", 1)
    assert "waited up to 1 s" in message


def one_stops_coming(bare, call: str) -> str:
    group = ProcessGroup.join(bare.worker, init_method=bare.meeting, timeout_seconds=1)
    runs = [range(100), range(100, 200)]
    area = group.gradient_area(200, [1, 1], [[0], [0]], runs)
    group.exchange(b"")
    if call == "post":
        group.post(b"", [0, 0])()
    told = "nothing"
    if group.worker.rank == 0:
        calls = {"exchange": lambda: group.exchange(b""), "collect": area.collect}
        calls |= dict.fromkeys(["post", "first post"], lambda: group.post(b"0", [1, 1])())
        with pytest.raises(PeerError, match="did not come in time") as caught:
            calls[call]()
        assert caught.value.__cause__ is not None
        told = call
        os.mknod(bare.meeting.removeprefix("file://") + ".told")
    else:
        while not os.path.exists(bare.meeting.removeprefix("file://") + ".told"):
            time.sleep(0.01)
    group.close()
    return told


@pytest.mark.parametrize("call", ["exchange", "collect", "post", "first post"])
def test_a_worker_that_does_not_come_in_time_counts_as_gone(fleet, call):
    assert fleet.play(one_stops_coming, "bare", 2, call=call) == [call, "nothing"]


def test_without_a_default_group_there_is_no_group():
    with pytest.raises(UsageError, match="not initialised"):
        ProcessGroup(Worker())


def test_a_meeting_place_that_cannot_be_used_is_a_settings_error():
    with pytest.raises(SettingsError, match="cannot meet at 'nowhere"):
        ProcessGroup.join(Worker(), init_method="nowhere://host", timeout_seconds=1)


def is_closed_twice(bare) -> None:
    group = ProcessGroup.join(bare.worker, init_method=bare.meeting, timeout_seconds=60)
    group.close()
    group.close()
    assert not dist.is_initialized()


def test_closing_twice_is_closing_once(fleet):
    fleet.play(is_closed_twice, "bare", 2)
