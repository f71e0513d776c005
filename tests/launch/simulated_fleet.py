"""A small world around the coordinator: workers, what they share, an operator and a scheduler, all of one seed.

Workers make steps of two exchanges (gradients are there; the update is done) and speak to the supervisor over channels.
The scheduler lets one of them take a turn, delivers one frame, reaps one process, or does harm. What the world holds
the coordinator to is asserted where it happens; a `Violation` says what was broken.

    start -> shards -> A -> update -> C -> boundary -> shards ...      -> finish -> left
                       |              |       |
                       +--- mend -----+   rendezvous   with joiners: replay -> ready -> rendezvous
"""

import random
from collections import Counter, deque

from samestep.core.worker import Wish
from samestep.launching import instructions as do
from samestep.launching.channel import Frame
from samestep.launching.coordinator import Coordinator, Setup
from samestep.launching.events import Exited, Facts, Heard, Hung, Signalled, Tick
from samestep.launching.failure import Failure
from samestep.launching.restarts import Restarts
from samestep.launching.roster import MOST_TRIES

MOST_TURNS = 20_000
_LEAVING = Wish.STOP | Wish.SCALE
_ANSWER = 64
"""Told with the orders: somebody who is no member was marked dead."""
_DELICATE = ("mend", "mended", "rendezvous", "joined", "ready", "replay", "halt", "farewell")
KILLS = (9, 9, 9, 11, 15, 7 << 8)


class Violation(AssertionError):
    """The coordinator did what it must not, or did not what it must."""


def hold(is_true, *what):
    if not is_true:
        raise Violation(*what)


class Process:
    """One worker."""

    def __init__(self, slot, generation, joins, step):
        self.slot = slot
        self.generation = generation
        self.state = "replay" if joins else "start"
        self.step = step
        self.work = 0
        self.sent = deque()
        self.is_alive = True
        self.is_reaped = False
        self.is_paused = False
        self.is_hung = False
        self.is_ready = False
        self.gets_kill = False
        self.gets_term = False
        self.status = 0

    def send(self, kind, /, **info):
        self.sent.append(Frame(kind, info))

    def die(self, status):
        self.is_alive, self.status = False, status


class Arena:
    """What the workers of one fleet share: who takes part, who has arrived where, who is marked dead."""

    def __init__(self, num_workers, step):
        self.members = set(range(num_workers))
        self.arrived = dict.fromkeys(range(num_workers), 0)
        self.marks = [0] * num_workers
        self.known = [0] * num_workers
        self.step = step
        self.told = (0, ())
        self.mending = set()
        self.asked = set()
        self.meeting = set()
        self.is_torn = False

    @property
    def gone(self):
        """Slots that are marked dead, which the survivors have not answered yet."""
        return {slot for slot, count in enumerate(self.marks) if count > self.known[slot]}


class World:
    """One run, over all its fleets."""

    def __init__(self, seed):
        draw = self.draw = random.Random(seed)
        self.num_workers = draw.choice((1, 2, 2, 3, 3, 3, 4))
        self.num_steps = draw.randint(2, 9)
        self.goes_on = draw.random() < 0.95
        self.mends_updates = draw.random() < 0.5
        self.faults = draw.choice((0, 1, 1, 2, 2, 3, 4, 6))
        self.is_doomed = draw.random() < 0.05  # replacements never come up
        self.is_hasty = draw.random() < 0.3  # faults strike fleets that have just begun
        self.signals = draw.choice((0, 0, 0, 0, 0, 0, 0, 0, 1, 2))
        self.scales = draw.random() < 0.1
        self.user_errors = draw.random() < 0.05
        self.loses = draw.random() < 0.25  # frames that a killed worker sent last
        self.pace = draw.choice(((0.4, 0.6, 0.9), (0.6, 0.8, 0.92), (0.8, 0.84, 0.9), (0.7, 0.75, 0.95)))
        self.slowness = draw.choice((2, 6, 30))  # of who has to tell that the survivors go on
        self.restarts = Restarts()
        self.now = 0.0
        self.orders, self.joiners, self.target = 0, (), None
        self.is_reached = self.lets_end = False
        self.num_calls = self.snapshot = 0
        self.signalled = []
        self.has_erred = False
        self.seen = Counter()
        self.outcome = None
        self._begin()

    # What the supervisor does for its coordinator.

    def _begin(self):
        self.seen["fleets"] += 1
        self.is_reached = self.lets_end = False
        self.arena = Arena(self.num_workers, self.snapshot)
        self.processes = {}
        self.stragglers = []
        self.tries = [0] * self.num_workers
        self.finished = False
        self.calls_before = self.num_calls
        self.deadline = None
        setup = Setup(
            num_workers=self.num_workers,
            has_snapshots=True,
            has_orders=True,
            survivors_go_on=self.goes_on and self.num_workers > 1,
            num_calls=self.num_calls,
        )
        self.coordinator = Coordinator(setup, self.restarts)
        for instruction in self.coordinator.begin():
            self._obey(instruction)

    def tell(self, event):
        facts = Facts(
            now=self.now,
            num_calls=self.num_calls,
            orders=self.orders,
            is_reached=self.is_reached,
            target=self.target,
        )
        coordinator = self.coordinator
        for instruction in coordinator.take(event, facts):
            self._obey(instruction)
        if self.coordinator is coordinator and self.orders & Wish.JOIN:
            late = [slot for slot in self.joiners if self.processes[slot].is_reaped]
            hold(not late, "JOIN stands for workers that are gone", late)

    def _obey(self, instruction):
        process = self.processes.get(getattr(instruction, "slot", None))
        hold(self.outcome is None, "an instruction after the end", instruction)
        self.seen["obeyed"] += 1
        match instruction:
            case do.Fork(slot, generation, joins):
                self._fork(slot, generation, joins, process)
            case do.Terminate():
                process.gets_term = True
            case do.Kill():
                process.gets_kill = True
                self.seen["dismissed"] += process.state in ("replay", "ready")
            case do.MarkDead(slot):
                hold(process.is_reaped, "marked dead before its exit", slot)
                self.arena.marks[slot] += 1
                self.seen["marked"] += 1
            case do.GiveOrder(wish):
                self.orders |= wish
            case do.Join(slots):
                self.joiners = slots
                self.orders = self.orders & ~Wish.JOIN | (Wish.JOIN if slots else 0)
                hold(all(self.processes[slot].is_ready for slot in slots), "asked in before it was ready", slots)
            case do.LetEnd():
                self.lets_end = True
            case do.Show(frame):
                self.finished |= frame.kind == "finished"
            case do.SetDeadline(at):
                self.deadline = at
            case do.End(outcome):
                self._end(outcome)
            case do.StartAgain(num_workers, outcome):
                self._check_all_gone()
                if outcome.wants is not None:
                    hold(self.target == num_workers, "another number than was ordered")
                    self.orders, self.target = self.orders & ~Wish.SCALE, None
                self.num_workers = num_workers
                self._begin()

    def _fork(self, slot, generation, joins, before):
        hold(before is None or before.is_reaped, "two workers in one slot", slot)
        hold(generation == (before.generation + 1 if before else 0), "a generation was left out")
        if joins:
            hold(self.goes_on and slot not in self.arena.members, "replaced before the others went on without it", slot)
            # A joiner that was none of them yet may be marked meanwhile: a slot more in the same list.
            hold(not self.arena.gone & self.arena.members, "replaced while they still miss somebody")
            self.tries[slot] += 1
            self.seen["forked again"] += self.tries[slot] > 1
            hold(self.tries[slot] <= MOST_TRIES, "replaced for ever", slot)
        self.processes[slot] = Process(slot, generation, joins, self.arena.step)

    def _end(self, outcome):
        self._check_all_gone()
        self.outcome = outcome
        if outcome.code == 0:
            hold(self.finished, "the run is said to be good, but did not finish")
        elif outcome.code > 128:
            hold(outcome.code - 128 in self.signalled, "a signal that nobody sent", outcome)
        else:
            is_fair = self.has_erred or self.restarts.in_vain
            hold(outcome.code == 1 and is_fair and outcome.message, "a failure without a reason", outcome)

    def _check_all_gone(self):
        hold(all(p.is_reaped for p in self.processes.values()), "the end, and somebody lives")
        hold(not self.orders & Wish.JOIN, "JOIN stands, and nobody is to join")

    # What a worker does in its turn: returns whether it did anything.

    def turn(self, process):
        if process.gets_kill:
            process.die(9)
            return True
        if process.is_paused:
            return False
        if process.gets_term and self.lets_end:
            process.gets_term = False
            if self.draw.random() < 0.9:
                process.die(15)
                return True
        return self._turns[process.state](self, process)

    def _works(self, process, most):
        """Whether it needs more turns for what it does now."""
        if process.work == 0:
            process.work = 1 + int(self.draw.random() * most)
        process.work -= 1
        return process.work > 0

    def _start(self, process):
        if not self._works(process, 3):
            if process.slot == 0:
                process.send("seated", num_workers=self.num_workers, can_scale=True)
            self._resume(process)
        return True

    def _shards(self, process):
        if self._works(process, 3):
            return True
        if self.user_errors and self.draw.random() < 0.1:
            self.user_errors, self.has_erred = self.draw.random() < 0.5, True
            kind = self.draw.choice(("ValueError", "OSError"))
            failure = Failure(kind=kind, message="a mistake", rank=process.slot, may_pass=kind == "OSError")
            process.send("error", **failure.to_dict())
            process.die(1 << 8)
            return True
        self._enter(process, "A")
        return True

    def _enter(self, process, state):
        arena = self.arena
        if state == "C" and process.slot == min(arena.members):
            arena.told = (self.orders | (_ANSWER if arena.gone - arena.members else 0), self.joiners)
        arena.arrived[process.slot] += 1
        process.state = state

    def _passes(self, process):
        """Whether all are here; who waits for somebody that is marked dead mends instead. None: it goes on waiting."""
        arena, arrived = self.arena, self.arena.arrived
        mine = arrived[process.slot]
        missing = [slot for slot in arena.members if arrived[slot] < mine]
        if not missing:
            return True
        if arena.gone.isdisjoint(missing):
            return None
        arena.is_torn = process.state == "C" and not self.mends_updates
        return self._mend(process)

    def _mend(self, process):
        self.arena.mending.add(process.slot)
        process.state = "mend"
        return False

    def _A(self, process):
        passes = self._passes(process)
        if passes:
            process.state = "update"
        return passes is not None

    def _update(self, process):
        if not self._works(process, 2):
            self._enter(process, "C")
        return True

    def _C(self, process):
        passes, arena = self._passes(process), self.arena
        if passes:
            process.state = "boundary"
            if arena.step == process.step:
                arena.step += 1
            process.step += 1
            hold(arena.step == process.step, "a step was made twice, or left out", arena.step)
            if process.slot == min(arena.members):
                self.num_calls = max(self.num_calls, arena.step)
                self.snapshot = arena.step if self.draw.random() < 0.5 else self.snapshot
        return passes is not None

    def _boundary(self, process):
        orders, joiners = self.arena.told
        asked = set(joiners) - self.arena.members
        if orders & _LEAVING:
            process.state = "halt"
        elif process.step == self.num_steps:
            self._enter(process, "F")
        elif orders & _ANSWER:
            self._mend(process)
        elif orders & Wish.JOIN and asked:
            self.arena.asked = asked
            process.state = "rendezvous"
        else:
            process.state = "shards"
        return True

    def _mend_all(self):
        """All who are left have met."""
        arena = self.arena
        arena.members -= arena.gone
        arena.known = list(arena.marks)
        self._go_on(arena.members, "lost" if arena.is_torn else "mended")

    def _join_all(self):
        arena = self.arena
        arena.members |= arena.asked
        for slot in arena.asked:
            self.tries[slot] = 0
        self._go_on(arena.members, "joined")

    def _go_on(self, slots, state):
        arena = self.arena
        arena.mending.clear()
        arena.meeting.clear()
        arena.asked = set()
        most = max(arena.arrived.values())
        for slot in slots:
            arena.arrived[slot] = most
            process = self.processes[slot]
            process.state, process.step, process.work = state, arena.step, 0

    def _meet_mend(self, process):
        arena = self.arena
        if arena.members - arena.gone <= arena.mending:
            self._mend_all()
            return True
        return False

    def _mended(self, process):
        if self._works(process, self.slowness):
            return True
        members = self.arena.members
        if process.slot == min(members):
            dead = [slot for slot in range(self.num_workers) if slot not in members]
            process.send("mended", first=process.slot, members=sorted(members), dead=dead, step=process.step)
            self.seen["mended"] += 1
        return self._resume(process)

    def _lost(self, process):
        # Each of them says so: one alone may die before it has.
        process.send("lost", slot=process.slot)
        self.seen["lost"] += 1
        process.state = "stuck"
        return True

    def _stuck(self, process):
        return False

    def _rendezvous(self, process):
        arena = self.arena
        needed = arena.members | arena.asked
        if arena.gone & needed:
            arena.is_torn = False
            self._mend(process)
        elif process.slot not in arena.meeting:
            arena.meeting.add(process.slot)
        elif needed <= arena.meeting:
            self._join_all()
        else:
            return False
        return True

    def _joined(self, process):
        if self._works(process, 2):
            return True
        members = self.arena.members
        if process.slot == min(members):
            process.send("joined", members=sorted(members), step=process.step)
            self.seen["back"] += 1
        return self._resume(process)

    def _resume(self, process):
        process.state = "shards"
        if process.step == self.num_steps:
            self._enter(process, "F")
        return True

    def _replay(self, process):
        if self._works(process, 4):
            return True
        if self.is_doomed or self.draw.random() < 0.05:
            word = self.draw.choice(("error", "left", "seated"))
            process.send(word, **(Failure(kind="OSError", message="no room").to_dict() if word == "error" else {}))
            process.die(0 if word == "left" else 1 << 8)
            return True
        process.send("ready", slot=process.slot, generation=process.generation)
        process.is_ready = True
        process.state = "ready"
        return True

    def _ready(self, process):
        arena = self.arena
        if process.slot in arena.asked - arena.meeting - arena.gone:
            arena.meeting.add(process.slot)
            return True
        return False

    def _F(self, process):
        passes = self._passes(process)
        if passes:
            process.state = "farewell"
        return passes is not None

    def _farewell(self, process):
        if process.slot == min(self.arena.members):
            process.send("finished")
        process.state = "leave"
        return True

    def _halt(self, process):
        if process.slot == min(self.arena.members):
            self.is_reached = True
            self.snapshot = process.step
            process.send("halted")
        process.state = "leave"
        return True

    def _leave(self, process):
        process.send(self.draw.choice(("left", "done")))
        process.die(0)
        return True

    # What happens between them and the supervisor.

    def hear(self, process):
        frame = process.sent.popleft()
        if frame.kind == "mended":
            self.seen["out of date"] += any(self.processes[slot].is_reaped for slot in frame.info["members"])
        self.tell(Heard(process.slot, process.generation, frame))

    def reap(self, process):
        # What was sent before it died is heard before its exit is told.
        others = list(self.processes.values())
        self.draw.shuffle(others)
        for other in others:
            while other.sent:
                self.hear(other)
        process.is_reaped = True
        self.tell(Exited(process.slot, process.generation, 100 + process.slot, process.status))

    def strike(self, process):
        """Do harm to a worker."""
        self.faults -= 1
        if self.draw.random() < 0.2:
            process.is_paused = True
            return
        process.die(self.draw.choice(KILLS))
        if self.loses and process.sent:
            late = [process.sent.pop() for _ in range(self.draw.randint(1, len(process.sent)))]
            if self.draw.random() < 0.8:
                self.stragglers += [(process, frame) for frame in reversed(late)]

    def harm(self, processes):
        draw = self.draw
        alive = [p for p in processes if p.is_alive]
        is_early = not self.is_hasty and self.num_calls <= self.calls_before
        late = [number for number, (process, _) in enumerate(self.stragglers) if process.is_reaped]
        if late and draw.random() < 0.5:
            process, frame = self.stragglers.pop(late[0])
            self.tell(Heard(process.slot, process.generation, frame))
        elif alive and self.faults and not is_early and draw.random() < 0.6:
            delicate = [p for p in alive if p.state in _DELICATE]
            first = draw.choice(delicate if delicate and draw.random() < 0.7 else alive)
            self.strike(first)
            if self.faults and draw.random() < 0.4:
                self.strike(draw.choice([p for p in alive if p is not first] or alive))
        elif self.signals and draw.random() < 0.3:
            self.signals -= 1
            self.signalled.append(draw.choice((2, 15)))
            self.tell(Signalled(self.signalled[-1]))
        elif self.scales and self.num_calls and not self.orders & Wish.STOP and not self.signalled:
            self.scales = False
            self.orders |= Wish.SCALE
            self.target = draw.randint(1, 4)
        else:
            paused = [p for p in alive if p.is_paused]
            if paused:
                self.end_pause(draw.choice(paused))

    def end_pause(self, process):
        if self.draw.random() < 0.3:
            process.is_paused = False
        elif not process.is_hung:
            process.is_hung = True
            self.tell(Hung(process.slot, process.generation, f"Worker {process.slot} hung."))
        elif self.coordinator.ending.has_begun:
            return
        else:
            hold(process.gets_kill, "a hung worker is not killed")

    def sweep(self):
        """Let everything happen that can; if nothing can, time passes."""
        before = self.seen["obeyed"]
        processes = list(self.processes.values())
        if any(p.is_alive and self.turn(p) for p in processes):
            return
        for process in processes:
            while process.sent and self.processes.get(process.slot) is process:
                self.hear(process)
                return
        for process in processes:
            if not process.is_alive and not process.is_reaped:
                self.reap(process)
                return
        self.tell(Tick())
        if self.seen["obeyed"] > before:
            return
        if self.deadline is not None:
            self.now = max(self.now, self.deadline)
            self.tell(Tick())
            return
        paused = [p for p in processes if p.is_alive and p.is_paused]
        hold(paused, "nothing can happen any more", [(p.slot, p.state, p.is_alive) for p in processes])
        self.end_pause(paused[0])

    def run(self):
        """Play until the run has ended; raises a Violation."""
        random, stall = self.draw.random, 0
        work, hearing, reaping = self.pace
        for _ in range(MOST_TURNS):
            if self.outcome is not None:
                return
            if stall > 12:
                self.sweep()
                stall = 8
                continue
            processes = list(self.processes.values())
            chance, process = random(), processes[int(random() * len(processes))]
            if chance < work:
                stall = 0 if process.is_alive and self.turn(process) else stall + 1
            elif chance < hearing:
                if process.sent:
                    self.hear(process)
                    stall = 0
            elif chance < reaping:
                if not process.is_alive and not process.is_reaped:
                    self.reap(process)
                    stall = 0
            elif chance < 0.97:
                self.harm(processes)
            else:
                if self.deadline is not None and random() < 0.2:
                    self.now = self.deadline
                self.tell(Tick())
        raise Violation("the run does not end")


STATES = (
    *("start", "shards", "A", "update", "C", "boundary", "mended", "lost", "stuck", "rendezvous", "joined"),
    *("replay", "ready", "F", "farewell", "halt", "leave"),
)
World._turns = {"mend": World._meet_mend, **{state: getattr(World, f"_{state}") for state in STATES}}
