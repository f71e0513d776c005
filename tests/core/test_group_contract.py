"""The contract of the seam, held over every group.

A program is a function of a group that every worker plays; it asserts, and returns what the test compares. `play`
plays it alone, as threads (also wrapped), or as processes that share memory (arena) or send (gloo).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import threading
import time

import numpy as np
import pytest
import torch

from samestep.core.fakes import Counting, Delaying, Failing, run_threads
from samestep.core.group import ALIGNMENT, Group, Solo
from samestep.errors import PeerError, UsageError

WRAPPERS = {
    "counting": Counting,
    "failing": lambda group: Failing(group, "exchange", 1_000_000),
    "delaying": lambda group: Delaying(group, 0.0),
}
IN_PROCESS = [("solo", 1), ("threads", 2), ("threads", 4)] + [(name, 3) for name in WRAPPERS]
ARENAS = [("arena", 2), ("arena", 3), ("arena", 4)]
GLOOS = [("gloo", 2), ("gloo", 3), ("gloo-staged", 2), ("gloo", 1)]
ALL = IN_PROCESS + ARENAS + GLOOS


def play(fleet, kind: str, size: int, program, **arguments) -> list:
    """Play a program that no worker may fail; return what the workers returned."""
    if kind == "solo":
        return [program(Solo(), **arguments)]
    if kind == "threads" or kind in WRAPPERS:
        wrap = WRAPPERS.get(kind, lambda group: group)
        return run_threads(lambda group: program(wrap(group), **arguments), size)
    return fleet.play(program, kind, size, **arguments)


def over(kinds):
    return pytest.mark.parametrize(("kind", "size"), kinds, ids=[f"{kind}-{size}" for kind, size in kinds])


def noise(num_bytes: int, *key: int) -> bytes:
    """Return bytes that depend on `key` alone, so that a reader can tell whose and when they are."""
    return np.random.default_rng(key).bytes(num_bytes)


def noise_tensor(num_bytes: int, *key: int) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(noise(num_bytes, *key), dtype=np.uint8).copy())


def layout_of(size: int, num_bytes: int, seed: int) -> dict:
    """Draw uneven buffers, nodes in any order, and runs with gaps and empty ones, the same on every worker."""
    rng = random.Random(seed)
    buffers_of = [rng.randint(1, 3) for _ in range(size)]
    nodes_of = [rng.sample(range(count), rng.randint(1, count)) for count in buffers_of]
    cuts = sorted(rng.randint(0, num_bytes) for _ in range(2 * size))
    runs = [range(cuts[2 * w], cuts[2 * w + 1]) for w in range(size)]
    if seed % 2:
        empty = rng.randrange(size)
        runs[empty] = range(runs[empty].start, runs[empty].start)
    return {"num_bytes": num_bytes, "buffers_of": buffers_of, "nodes_of": nodes_of, "runs": runs}


# ---------------------------------------------------------------------------------------------------- exchange


def exchange_keeps_rank_order(group: Group) -> list[str]:
    replies = group.exchange(f"worker {group.worker.rank}".encode())
    assert all(type(reply) is bytes for reply in replies)
    return [reply.decode() for reply in replies]


@over(ALL)
def test_exchange_gives_all_messages_in_rank_order(fleet, kind, size):
    expected = [f"worker {rank}" for rank in range(size)]
    assert play(fleet, kind, size, exchange_keeps_rank_order) == [expected] * size


def exchange_keeps_lengths(group: Group, lengths: list[int]) -> None:
    rank, size = group.worker.rank, group.worker.size
    for turn in range(len(lengths)):
        length_of = [lengths[(turn + w) % len(lengths)] for w in range(size)]
        replies = group.exchange(noise(length_of[rank], turn, rank))
        assert replies == [noise(length_of[w], turn, w) for w in range(size)]


@over(ALL)
def test_exchange_keeps_every_length(fleet, kind, size):
    # Around the sizes of slots and buffers, several of them in one round, and above 1 MiB.
    lengths = [0, 1, 4087, 4088, 4089, 4096, 4097, 0, 65535, 65536, 65537, 131071, 1_500_001, 0, 7]
    play(fleet, kind, size, exchange_keeps_lengths, lengths=lengths)


def exchange_many_rounds(group: Group, num_rounds: int) -> None:
    rank, size = group.worker.rank, group.worker.size
    dice = random.Random(rank)
    kept = []
    for turn in range(num_rounds):
        if dice.random() < 0.05:
            time.sleep(dice.random() * 5e-4)
        replies = group.exchange(b"%d of %d" % (turn, rank))
        assert replies == [b"%d of %d" % (turn, w) for w in range(size)]
        kept.append(replies)
    assert kept == [[b"%d of %d" % (turn, w) for w in range(size)] for turn in range(num_rounds)]


@over(ALL)
def test_nobody_sees_an_old_or_a_future_message(fleet, kind, size):
    play(fleet, kind, size, exchange_many_rounds, num_rounds=200 if kind in WRAPPERS else 1000)


def writes_are_seen(group: Group, num_rounds: int) -> None:
    """What a worker writes before an exchange, all see after it; so nobody left it before all had come."""
    rank, size = group.worker.rank, group.worker.size
    words = group.allocate(64 * size).view(torch.int64).view(size, 8).numpy()
    dice = random.Random(rank)
    for turn in range(1, num_rounds + 1):
        if dice.random() < 0.05:
            time.sleep(dice.random() * 5e-4)
        words[rank, 0] = turn
        group.exchange(b"")
        assert all(turn <= words[w, 0] <= turn + 1 for w in range(size))


@over(IN_PROCESS + ARENAS)
def test_exchange_publishes_what_was_written(fleet, kind, size):
    play(fleet, kind, size, writes_are_seen, num_rounds=200 if kind in WRAPPERS else 500)


# ---------------------------------------------------------------------------------------------------- post


def posts_keep_order_and_length(group: Group, lengths: list[int]) -> None:
    """Several posts are under way at once, with exchanges between; the last is not waited for before the group ends."""
    rank, size = group.worker.rank, group.worker.size
    under_way: list = []

    def check() -> None:
        expected, wait = under_way.pop(len(under_way) // 2)
        assert wait() == expected

    for turn in range(len(lengths)):
        messages = [noise(lengths[(turn + w) % len(lengths)], turn, w) for w in range(size)]
        under_way.append((messages, group.post(messages[rank], [len(message) for message in messages])))
        assert group.exchange(b"%d of %d" % (turn, rank)) == [b"%d of %d" % (turn, w) for w in range(size)]
        if len(under_way) > 3:
            check()
    while len(under_way) > 1:
        check()


@over(ALL)
def test_posts_arrive_whenever_they_are_waited_for(fleet, kind, size):
    play(fleet, kind, size, posts_keep_order_and_length, lengths=[0, 1, 4097, 0, 0, 300_001, 64, 1_500_001, 7])


def posts_go_on_while_nobody_waits(group: Group, mark: str) -> None:
    """The second worker gets all of what the first has posted, while the first does something else."""
    first = group.worker.is_first
    lengths = [4_000_001, 0]
    group.post(b"", [0, 0])()
    wait = group.post(noise(lengths[0], 1) if first else b"", lengths)
    if first:
        while not os.path.exists(mark):
            time.sleep(0.01)
    assert wait()[0] == noise(lengths[0], 1)
    if not first:
        os.mknod(mark)
    group.exchange(b"")


def test_a_post_needs_nobody_who_waits(fleet, tmp_path):
    play(fleet, "gloo", 2, posts_go_on_while_nobody_waits, mark=str(tmp_path / "mark"))


# ---------------------------------------------------------------------------------------------------- memory


def allocate_keeps_its_word(group: Group) -> bool:
    rank, size = group.worker.rank, group.worker.size
    lengths = [size, 63, 64, 65, 1000, 4096, 4097, 1 << 20]
    lengths = [max(length, size) for length in lengths]
    memories = [group.allocate(length) for length in lengths]
    for memory, length in zip(memories, lengths, strict=True):
        assert (memory.dtype, tuple(memory.shape)) == (torch.uint8, (length,))
        assert memory.data_ptr() % ALIGNMENT == 0
        assert not memory.any()
    spans = sorted((m.data_ptr(), m.data_ptr() + m.numel()) for m in memories)
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(spans))
    group.exchange(b"")
    for number, memory in enumerate(memories):
        memory[rank] = 10 * (number + 1) + rank
    group.exchange(b"")
    for number, memory in enumerate(memories):
        shown = [10 * (number + 1) + w if group.shares_memory or w == rank else 0 for w in range(size)]
        assert memory[:size].tolist() == shown
        assert not memory[size:].any()
    return group.shares_memory


@over(ALL)
def test_memory_is_zero_aligned_apart_and_shared_as_said(fleet, kind, size):
    shared = not kind.startswith("gloo")
    assert play(fleet, kind, size, allocate_keeps_its_word) == [shared] * size


# ---------------------------------------------------------------------------------------------------- gradients


def collect_returns_what_was_published(group: Group, num_bytes: int, seeds: list[int], num_steps: int) -> int:
    """Two or more areas at once, filled in turn. Returns the number of bytes that were compared."""
    rank, size = group.worker.rank, group.worker.size
    bystander = group.allocate(256)
    layouts = [layout_of(size, num_bytes + seed, seed) for seed in seeds]
    areas = [group.gradient_area(**layout) for layout in layouts]
    places = [[[node.data_ptr() for node in nodes] for nodes in area.nodes] for area in areas]
    num_compared = 0
    for step in range(num_steps):
        for number, (layout, area) in enumerate(zip(layouts, areas, strict=True)):
            length, run = layout["num_bytes"], layout["runs"][rank]
            assert len(area.mine) == layout["buffers_of"][rank]
            for b, buffer in enumerate(area.mine):
                assert (buffer.dtype, tuple(buffer.shape)) == (torch.uint8, (length,))
                assert buffer.data_ptr() % ALIGNMENT == 0
                buffer.copy_(noise_tensor(length, step, number, rank, b))
            group.exchange(b"published")
            area.collect()
            assert [len(nodes) for nodes in area.nodes] == [len(nodes) for nodes in layout["nodes_of"]]
            for w, nodes in enumerate(layout["nodes_of"]):
                for node, b in zip(area.nodes[w], nodes, strict=True):
                    published = noise_tensor(length, step, number, w, b)[run.start : run.stop]
                    assert torch.equal(node, published), (step, number, w, b)
                    num_compared += node.numel()
            for b, buffer in enumerate(area.mine):
                assert torch.equal(buffer, noise_tensor(length, step, number, rank, b))
            group.exchange(b"read")
    assert [[[node.data_ptr() for node in nodes] for nodes in area.nodes] for area in areas] == places
    assert not bystander.any()
    return num_compared


@over(ALL)
@pytest.mark.parametrize("num_bytes", [1, 1000, 70_001])
def test_collect_gives_each_owner_its_runs_of_all_nodes(fleet, kind, size, num_bytes):
    seeds = list(range(6))
    compared = play(
        fleet, kind, size, collect_returns_what_was_published, num_bytes=num_bytes, seeds=seeds, num_steps=3
    )
    layouts = [layout_of(size, num_bytes + seed, seed) for seed in seeds]
    num_nodes = [sum(len(nodes) for nodes in layout["nodes_of"]) for layout in layouts]
    assert compared == [
        3 * sum(n * len(layout["runs"][rank]) for n, layout in zip(num_nodes, layouts, strict=True))
        for rank in range(size)
    ]


@over([("arena", 2), ("gloo", 2), ("gloo", 3), ("gloo-staged", 2)])
def test_collect_moves_large_buffers(fleet, kind, size):
    compared = play(fleet, kind, size, collect_returns_what_was_published, num_bytes=3_000_000, seeds=[4], num_steps=1)
    assert sum(compared) > 1_000_000


def area_without_runs(group: Group) -> None:
    size = group.worker.size
    area = group.gradient_area(100, [2] * size, [[1, 0]] * size, [range(0)] * size)
    group.exchange(b"")
    area.collect()
    assert [node.numel() for nodes in area.nodes for node in nodes] == [0] * (2 * size)


@over(ALL)
def test_an_area_of_which_nobody_owns_anything(fleet, kind, size):
    play(fleet, kind, size, area_without_runs)


# ---------------------------------------------------------------------------------------------------- share


def share_shows_the_owners_bytes(group: Group, num_bytes: int, seeds: list[int], num_steps: int) -> None:
    rank, size = group.worker.rank, group.worker.size
    runs_of = [layout_of(size, num_bytes, seed)["runs"] for seed in seeds]
    memories = [group.allocate(num_bytes) for _ in seeds]
    bystander = group.allocate(256)
    group.exchange(b"")
    for step in range(num_steps):
        for number, (memory, runs) in enumerate(zip(memories, runs_of, strict=True)):
            own = runs[rank]
            memory[own.start : own.stop] = noise_tensor(len(own), step, number, rank)
            group.share(memory, runs)
        group.exchange(b"shared")
        for number, (memory, runs) in enumerate(zip(memories, runs_of, strict=True)):
            expected = torch.zeros(num_bytes, dtype=torch.uint8)
            for w, run in enumerate(runs):
                expected[run.start : run.stop] = noise_tensor(len(run), step, number, w)
            assert torch.equal(memory, expected)
        group.exchange(b"read")
    assert not bystander.any()


@over(ALL)
@pytest.mark.parametrize("num_bytes", [3, 70_001])
def test_share_shows_everybody_the_owners_bytes(fleet, kind, size, num_bytes):
    play(fleet, kind, size, share_shows_the_owners_bytes, num_bytes=num_bytes, seeds=[0, 1, 2, 3], num_steps=3)


# ---------------------------------------------------------------------------------------------------- a worker ends


def goes_on_until_one_is_gone(group: Group, victim: int, at_round: int, how: str) -> int:
    """Returns the number of whole rounds before the `PeerError`."""
    for turn in range(at_round + 100):
        if group.worker.rank == victim and turn == at_round:
            end(how)
        try:
            group.exchange(noise(5000, turn))
        except PeerError as error:
            assert str(error)
            with pytest.raises(PeerError):
                group.exchange(b"still here?")
            return turn
    raise AssertionError("nobody was missed")


def end(how: str) -> None:
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise ValueError("planted")


@over([entry for entry in ARENAS + GLOOS if entry[1] > 1])
@pytest.mark.parametrize("how", ["kill", "raise"])
@pytest.mark.parametrize("at_round", [0, 7])
def test_who_waits_for_a_worker_that_ended_gets_a_peer_error(fleet, kind, size, how, at_round):
    # The arena learns of it from its supervisor; here that is the fleet's parent, which calls Handles.abort.
    victim = size // 2
    outcomes = fleet.outcomes(
        goes_on_until_one_is_gone, kind, size, limit_seconds=20, victim=victim, at_round=at_round, how=how
    )
    ended = outcomes.pop(victim)
    assert ended["exit"] == -signal.SIGKILL if how == "kill" else ended["raised"][0] == "ValueError", ended
    for outcome in outcomes:
        # Who is one round behind may hear of the abort before it sees that this round was complete.
        assert outcome.get("returned") in (at_round - 1, at_round), outcome
        assert outcome["left"] == []


@pytest.mark.parametrize("at_round", [0, 7])
@pytest.mark.parametrize("size", [2, 3])
def test_threads_get_a_peer_error_when_one_raises(size, at_round):
    victim, rounds = size // 2, {}

    def program(group):
        rounds[group.worker.rank] = goes_on_until_one_is_gone(group, victim, at_round, "raise")

    with pytest.raises(ValueError, match="planted"):
        run_threads(program, size)
    assert rounds == {rank: at_round for rank in range(size) if rank != victim}


def one_is_gone_before_the_transfer(group: Group, victim: int) -> str:
    """Returns which call told it."""
    size = group.worker.size
    num_bytes = 4_000_000
    runs = [range(w * num_bytes // size, (w + 1) * num_bytes // size) for w in range(size)]
    area = group.gradient_area(num_bytes, [1] * size, [[0]] * size, runs)
    memory = group.allocate(num_bytes)
    group.exchange(b"published")
    if group.worker.rank == victim:
        end("kill")
    for name, call in (
        ("collect", area.collect),
        ("share", lambda: group.share(memory, runs)),
        ("exchange", lambda: group.exchange(b"updated")),
    ):
        try:
            call()
        except PeerError:
            return name
    return "nobody"


@over([("arena", 3), ("gloo", 2), ("gloo", 3), ("gloo-staged", 2)])
def test_a_worker_that_ends_before_a_transfer_is_missed(fleet, kind, size):
    outcomes = fleet.outcomes(one_is_gone_before_the_transfer, kind, size, limit_seconds=20, victim=1)
    assert outcomes.pop(1)["exit"] == -signal.SIGKILL
    told = {outcome.get("returned", str(outcome)) for outcome in outcomes}
    assert told == ({"exchange"} if kind == "arena" else {"collect"})
    assert all(outcome["left"] == [] for outcome in outcomes)


# -------------------------------------------------------------------------------------------------------- beside


def two_threads(group: Group, num_rounds: int) -> str:
    """Two threads of each worker exchange and send at the same time, at a pace of their own."""
    rank, size = group.worker.rank, group.worker.size
    failed: list[BaseException] = []

    def play(mine: Group, who: int) -> None:
        runs = [range(w * 1000, (w + 1) * 1000) for w in range(size)]
        area = mine.gradient_area(1000 * size, [1] * size, [[0]] * size, runs)
        dice = random.Random(10 * rank + who)
        try:
            for turn in range(num_rounds):
                if dice.random() < 0.05:
                    time.sleep(dice.random() * 5e-4)
                replies = mine.exchange(noise(100, who, turn, rank))
                assert replies == [noise(100, who, turn, w) for w in range(size)]
                area.mine[0].copy_(noise_tensor(1000 * size, who, turn, rank))
                area.collect()
                for w, (node,) in enumerate(area.nodes):
                    assert torch.equal(node, noise_tensor(1000 * size, who, turn, w)[rank * 1000 :][:1000])
                mine.exchange(b"")
        except BaseException as error:
            failed.append(error)
            raise

    closed: list[str] = []
    beside = group.beside(lambda: closed.append("closed"))
    assert beside.worker == group.worker and not beside.shares_memory
    thread = threading.Thread(target=play, args=(beside, 1))
    thread.start()
    play(group, 0)
    thread.join()
    assert not failed and not closed
    group.close()
    return closed[0]


@over(GLOOS)
def test_another_thread_has_a_group_beside(fleet, kind, size):
    assert play(fleet, kind, size, two_threads, num_rounds=30) == ["closed"] * size


def has_none_beside(group: Group) -> str:
    with pytest.raises(UsageError) as caught:
        group.beside(lambda: None)
    return str(caught.value)


@over([("solo", 1), ("threads", 2), ("arena", 2)])
def test_where_memory_is_shared_there_is_nothing_beside(fleet, kind, size):
    assert all("share memory" in words for words in play(fleet, kind, size, has_none_beside))


# ------------------------------------------------------------------------------------------------ without meeting


def counts_alone(group: Group, num_rounds: int) -> int:
    """Everybody counts up one number, slowly; the last one then waits for all."""
    words = group.allocate(8).view(torch.int64)
    for _ in range(num_rounds):
        with group.exclusive:
            seen = int(words[0])
            os.sched_yield()
            words[0] = seen + 1
        group.wake()
    group.wait_until(lambda: int(words[0]) == num_rounds * group.worker.size)
    return int(words[0])


@over(IN_PROCESS + ARENAS)
def test_one_at_a_time(fleet, kind, size):
    assert play(fleet, kind, size, counts_alone, num_rounds=100) == [100 * size] * size


def turns_and_meetings(group: Group, num_rounds: int) -> None:
    """Waits and exchanges in turn, at another pace on every worker."""
    words = group.allocate(8 * group.worker.size).view(torch.int64)
    rank, size = group.worker.rank, group.worker.size
    for turn in range(num_rounds):
        for count in range(1 + (rank + turn) % 3):
            words[rank] = turn * 3 + count + 1
            group.wake()
        group.wait_until(lambda turn=turn: int(words[(rank + 1) % size]) > turn * 3)
        assert group.exchange(b"%d" % turn) == [b"%d" % turn] * size


@over(IN_PROCESS + ARENAS)
def test_waits_between_exchanges(fleet, kind, size):
    play(fleet, kind, size, turns_and_meetings, num_rounds=30)


def waits_for_one_that_is_gone(group: Group) -> str:
    group.exchange(b"")
    if group.worker.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        group.wait_until(lambda: False)
    except PeerError as error:
        return str(error)
    return ""


def test_nobody_waits_for_one_that_is_gone(fleet):
    outcomes = fleet.outcomes(waits_for_one_that_is_gone, "arena", 2, limit_seconds=30)
    assert "returned" in outcomes[1] and outcomes[1]["returned"], outcomes


def holds_the_lock_and_dies(group: Group) -> bool:
    words = group.allocate(8).view(torch.int64)
    group.exchange(b"")
    if group.worker.rank == 0:
        with group.exclusive:
            words[0] = 1
            os.kill(os.getpid(), signal.SIGKILL)
    while not int(words[0]):
        time.sleep(0.001)
    with group.exclusive:
        return True


def test_a_lock_does_not_outlive_who_holds_it(fleet):
    outcomes = fleet.outcomes(holds_the_lock_and_dies, "arena", 2, limit_seconds=30)
    assert outcomes[1].get("returned") is True, outcomes


# ---------------------------------------------------------------------------------------------------- names and ports


def has_no_name(group: Group) -> list[str]:
    """Returns the sockets and named shared memories that this worker holds while the group is in use."""
    memory = group.allocate(1000)
    group.exchange(b"")
    links = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the descriptor of the listing itself
            links.append(os.readlink(f"/proc/self/fd/{number}"))
    with open("/proc/self/maps") as maps:
        links += [line.split(maxsplit=5)[-1].strip() for line in maps]
    assert memory.numel() == 1000
    return sorted({link for link in links if link.startswith(("socket:", "/dev/shm"))})


def test_the_arena_has_no_name_and_no_port(fleet):
    assert play(fleet, "arena", 2, has_no_name) == [[], []]


def test_the_check_for_names_sees_sockets(fleet):
    assert all(links for links in play(fleet, "gloo", 2, has_no_name))


def leaves_a_descriptor(group: Group) -> None:
    os.dup(0)


def test_the_check_for_what_is_left_sees_a_descriptor(fleet):
    outcomes = fleet.outcomes(leaves_a_descriptor, "arena", 2)
    assert [len(outcome["left"]) for outcome in outcomes] == [1, 1]
