"""The ways in: `launch`, `samestep run`, `samestep verify`, and the zygote that a `launch` elsewhere starts."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn, TypedDict, Unpack

from samestep.errors import SamestepError, SettingsError, UsageError, WorkerError
from samestep.launching import caller, environment, payload, script, zygote
from samestep.launching.channel import Frame
from samestep.launching.context import WorkerContext, current
from samestep.launching.control import Control
from samestep.launching.failure import SETTINGS_CODE, Failure
from samestep.launching.leftovers import without_empty_folders
from samestep.launching.orders import Orders
from samestep.launching.output import Muted, Plumbing
from samestep.launching.supervisor import Fleet, supervise
from samestep.launching.verdict import Outcome
from samestep.launching.writer import Writer
from samestep.settings import seat
from samestep.settings.checkpoints import write_lent
from samestep.settings.options import Options, words_of
from samestep.settings.origin import keep as keep_lines

_WARM = (*zygote.WARM, "samestep.loop.run", "samestep.loop.session", "samestep.core.arena")
"""What the zygote imports, so that workers need not."""

_earlier: list[bytes] = []
"""Results of the launch calls of this process, packed; empty bytes for one that failed."""


class Saving(TypedDict, total=False):
    """What a run writes down and goes on from; `launch` says what each is."""

    checkpoint: str | os.PathLike[str] | None
    every: int | str | None
    async_checkpoints: bool | None
    resume: str | os.PathLike[str] | None
    accept: str | Sequence[str] | None
    hang_after: float | None
    protect: bool | None
    balance: bool | None


def launch(
    main: Callable[[Any], Any],
    *,
    replicas: int | Literal["workers"] = 8,
    workers: int | None = None,
    seed: int = 0,
    threads: int = 1,
    **saving: Unpack[Saving],
) -> Any:
    """Train: call `main(run)` on every worker, and return what it returned.

    The same script runs alone (`python script.py`), under `samestep run`, and under torchrun or a launcher that sets
    the same variables. In a notebook or at a prompt, `main` travels to the workers by value, with what it closes over.
    What `samestep run` is told wins over the arguments here.

    Args:
        main: takes a `samestep.Run`.
        replicas: logical copies of the model, part of the recipe: they decide the result. "workers" takes as many as
            there are workers, and gives up the promise that the result does not depend on their number.
        workers: processes to start; default one per core, at most `replicas`.
        seed: of every random number.
        threads: intra-op threads of each worker, part of the recipe.
        protect: keep the newest state in memory, so that the run survives dead workers (default). False saves that
            memory (as much as weights and optimizer state, once or twice); a dead worker then ends the run.
        balance: let replicas move away from workers that are steadily slower (default). The result stays the same.
        hang_after: seconds without progress after which a worker is replaced, or 8 times the usual step if that is
            longer; default 5, or 1 for a worker that was stopped by a signal; 0 for never.
        checkpoint: folder for checkpoints.
        every: steps between checkpoints, or time: "30s", "10m", "2h".
        async_checkpoints: write them beside training, which then pauses only while its state is copied in memory.
        resume: checkpoint, or folder of them, to go on from.
        accept: what may differ from it all the same: "code", "environment", "data", one or several.

    Returns:
        What `main` returned. Outside of the workers: None if it holds more than numbers, text, bytes, tensors, arrays,
        and lists, tuples and dicts of these.

    Raises:
        SettingsError: settings clash. In a script it is printed, and the exit code is 2.
        WorkerError: a worker failed; the message holds its error. In a script it is printed, and the exit code is 1.
    """
    if not callable(main):
        raise UsageError(
            f"launch() was given {main!r}. Give it the function itself, without calling it: launch(main), not "
            "launch(main())."
        )
    if unknown := sorted(saving.keys() - Saving.__annotations__.keys()):
        raise TypeError(f"launch() got an unexpected keyword argument {unknown[0]!r}")
    checkpoint, resume, accept = saving.get("checkpoint"), saving.get("resume"), saving.get("accept")
    asked = Options(
        workers=workers,
        replicas=replicas,
        threads=threads,
        seed=seed,
        checkpoint=os.fspath(checkpoint) if checkpoint is not None else None,
        every=saving.get("every"),
        async_checkpoints=saving.get("async_checkpoints"),
        resume=os.fspath(resume) if resume is not None else None,
        accept=words_of(accept) if accept is not None else None,
        hang_after=saving.get("hang_after"),
        protect=saving.get("protect"),
        balance=saving.get("balance"),
        device=environment.device_kind(),
    )
    context = current()
    if context is not None:
        return seat.take_part(context, main, asked)
    if environment.has_launcher():
        from samestep.settings.audience import LaunchedAudience

        return seat.take_part_in_group(main, asked, LaunchedAudience(_title(script.of_this_process())))
    return _launch_elsewhere(main, asked)


def run_script(
    path: str, arguments: Sequence[str], options: Options, summary_path: str | None = None
) -> tuple[int, str]:
    """Run a script on this host: this process becomes the zygote of its workers.

    Args:
        path: the script.
        arguments: what it finds in `sys.argv` after its name.
        options: what the command line set.
        summary_path: file to write the facts of the run to.

    Returns:
        Exit code, and what to print.

    Raises:
        SettingsError: settings clash, or there is no such script.
        SyntaxError: the script is not Python.
    """
    program = script.Script(path=path, argv=(path, *arguments))
    program.check()
    _keep(program)
    _check_folder_of(summary_path)
    num_workers = options.num_workers(environment.num_cores())
    environment.prepare()
    with without_empty_folders():
        zygote.warm(_WARM)
        from samestep.settings.audience import Audience, plumbing

        audience = Audience(_title(program))
        fleet = _fleet(functools.partial(_play_script, program), options, plumbing())
        outcome = _supervise(fleet, num_workers, audience, _title(program))
    audience.end(summary_path)
    return outcome.code, outcome.message


@dataclass(frozen=True)
class Chaos:
    """What came of a run under faults.

    Attributes:
        code: exit code of the disturbed run.
        message: what it said at its end.
        undisturbed, disturbed: facts of the two runs; `disturbed` is None if it did not finish.
        strikes: the faults that struck.
    """

    code: int
    message: str
    undisturbed: dict[str, Any]
    disturbed: dict[str, Any] | None
    strikes: list[Any]


def chaos_script(path: str, arguments: Sequence[str], options: Options, num_faults: int, seed: int) -> Chaos:
    """Run a script undisturbed, then under random faults.

    Args:
        path: the script.
        arguments: what it finds in `sys.argv` after its name.
        options: what the command line set.
        num_faults: how many faults.
        seed: of which faults strike whom, and when.

    Raises:
        SettingsError: settings clash, there is no such script, or it is too short for so many faults.
        SyntaxError: the script is not Python.
        WorkerError: the undisturbed run failed.
    """
    program = script.Script(path=path, argv=(path, *arguments))
    program.check()
    _keep(program)
    num_workers = options.num_workers(environment.num_cores())
    environment.prepare()
    with without_empty_folders():
        zygote.warm(_WARM)
        from samestep.launching.injector import Injector, plan
        from samestep.settings.audience import Audience

        def fleet() -> Fleet:
            return _fleet(functools.partial(_play_script, program), options, Plumbing(hidden=True))

        calm, undisturbed = Audience(f"{_title(program)} undisturbed"), fleet()
        outcome = supervise(undisturbed, num_workers, calm)
        calm.close()
        if outcome.code or 0 not in calm.facts or undisturbed.snapshots is None:
            raise WorkerError(f"The run without faults failed, so there is nothing to compare.\n{outcome.message}")
        facts, num_calls = calm.facts[0], undisturbed.snapshots.num_calls
        if num_calls <= num_faults:
            raise SettingsError(
                f"You set --faults {num_faults}, but the script makes only {num_calls} steps and other recorded calls, "
                f"and each fault needs one of its own. Use --faults {max(1, num_calls // 2)}, or more steps."
            )
        draw, disturbed, audience = random.Random(seed), fleet(), Audience(f"{_title(program)} under faults")
        assert disturbed.snapshots is not None
        snapshots = disturbed.snapshots
        seconds = facts["seconds_total"] / num_calls
        injector = Injector(plan(num_faults, num_calls, draw), seconds, lambda: snapshots.num_calls, draw)
        outcome = supervise(replace(disturbed, injector=injector), num_workers, audience)
        audience.close()
    return Chaos(outcome.code, outcome.message, facts, audience.facts.get(0), injector.strikes)


def verify_script(
    path: str, arguments: Sequence[str], options: Options, counts: Sequence[int]
) -> dict[int, list[dict[str, Any]]]:
    """Run a script's first steps at each number of workers.

    Args:
        path: the script.
        arguments: what it finds in `sys.argv` after its name.
        options: what the command line set; `trace` is the number of steps.
        counts: numbers of workers.

    Returns:
        For each number, one frame per step: step, loss, tensors (name to digest).

    Raises:
        SettingsError: settings clash, or there is no such script.
        SyntaxError: the script is not Python.
        WorkerError: a run failed.
    """
    program = script.Script(path=path, argv=(path, *arguments))
    program.check()
    _keep(program)
    for count in counts:
        replace(options, workers=count).check()
    environment.prepare()
    traces = {}
    with without_empty_folders():
        zygote.warm(_WARM)
        from samestep.settings.audience import TraceAudience

        for count in counts:
            audience = TraceAudience(options.trace or 1)
            set_here = replace(options, workers=count)
            fleet = _fleet(functools.partial(_play_script, program), set_here, Plumbing(hidden=True))
            outcome = supervise(fleet, count, audience)
            if outcome.code:
                raise WorkerError(f"The run with {count} workers failed.\n{outcome.message}".rstrip())
            traces[count] = audience.steps
    return traces


def serve(descriptor: int, caller_pid: int) -> int:
    """Be the zygote of a launch call in another process.

    Args:
        descriptor: a socket to that process.
        caller_pid: its pid; this process does not outlive it.

    Returns:
        Exit code.
    """
    zygote.die_with(caller_pid)
    job, sender = caller.receive(descriptor)
    sys.path[:] = job.sys_path
    with without_empty_folders(), contextlib.suppress(KeyboardInterrupt):
        zygote.warm(_WARM)
        from samestep.settings.audience import Audience, plumbing

        audience = Audience(_title(job.script))
        options = Options.from_dict(job.options)
        if job.script is not None:
            _keep(job.script)
        body = functools.partial(_play_payload, job)
        fleet = _fleet(body, options, plumbing(), earlier=job.earlier, leaves=True)
        try:
            outcome = _supervise(fleet, job.num_workers, audience, _title(job.script))
            code, message = outcome.code, outcome.message
        except SamestepError as error:
            code, message = 1, Failure.of(error).text()
        audience.end()
        has_result = code == 0 and audience.result is not None
        sender.send("reply", {"code": code, "message": message, "has_result": has_result}, audience.result or b"")
        return 0
    return 130


def _supervise(fleet: Fleet, num_workers: int, audience: Any, title: str) -> Outcome:
    """Supervise a fleet that its user can speak to, and say at the end what was kept."""
    from samestep.settings.farewell import with_farewell

    assert fleet.orders is not None
    try:
        control = Control(title, fleet.orders, _check_scale)
    except OSError as error:
        audience.frame(Frame("note", {"text": f"samestep: ps, scale and stop will not find this run: {error}."}))
        return with_farewell(supervise(fleet, num_workers, audience))
    message = ""
    try:
        outcome = with_farewell(supervise(replace(fleet, control=control), num_workers, audience))
        message = outcome.message if outcome.ended_by is not None else "The run ended by itself."
    finally:
        control.close(message)
    return outcome


def _check_scale(settings: dict[str, Any], num_workers: Any) -> None:
    replace(Options.from_dict(settings), workers=num_workers).check()


def _launch_elsewhere(main: Callable[[Any], Any], asked: Options) -> Any:
    """Start a zygote for this call, and wait."""
    home = payload.script_of(main)
    try:
        job = payload.Payload(
            num_workers=asked.num_workers(environment.num_cores()),
            options=asked.to_dict(),
            script=home,
            function=payload.by_value(main) if home is None else b"",
            earlier=tuple(_earlier) if home is not None else (),
            sys_path=payload.absolute_sys_path(),
        )
        asked.keeping()
    except SettingsError as error:
        if home is None:
            raise
        _leave(SETTINGS_CODE, Failure.of(error).text())
    try:
        reply = caller.call(job)
    except KeyboardInterrupt as error:
        if home is None:
            raise
        _leave(130, str(error) or "samestep: SIGINT ended the run before it began.")
    _earlier.append(reply.result if reply.code == 0 and reply.result is not None else b"")
    if reply.code and home is not None:
        _leave(reply.code, reply.message)
    if reply.code:
        raise WorkerError(reply.message or f"The function given to launch() left with exit code {reply.code}.")
    return seat.recorded(reply.result) if reply.result is not None else None


def _leave(code: int, message: str) -> NoReturn:
    if message:
        with contextlib.suppress(OSError):
            print(message, file=sys.stderr)
    raise SystemExit(code)


def _fleet(body: zygote.Body, options: Options, plumbing: Plumbing, **context: Any) -> Fleet:
    from samestep.core.arena import Handles
    from samestep.core.memory import num_oom_kills
    from samestep.core.snapshot import Snapshots

    # Its memory has no name and goes with this process. `verify` compares runs: a death is an error there.
    snapshots = Snapshots() if options.trace is None else None
    orders = Orders()
    writer = None
    if snapshots is not None:
        writer = Writer(functools.partial(write_lent, snapshots), snapshots.take_back, lambda: snapshots.lender)
    return Fleet(
        body=body,
        context={"options": options.to_dict(), "snapshots": snapshots, "orders": orders, "writer": writer, **context},
        share=Handles.create,
        plumbing=plumbing,
        run_folder=options.checkpoint,
        snapshots=snapshots,
        num_oom_kills=num_oom_kills,
        orders=orders,
        survivors_go_on=True,
        writer=writer,
    )


def _play_script(program: script.Script, context: WorkerContext) -> None:
    """A worker's life under `samestep run`."""
    _mute_what_was_shown(context)
    program.place_folder()
    program.run()
    if context.num_calls == 0:
        raise UsageError(
            f"{program.path} ended without calling samestep.launch, so each of the {context.num_forked} workers ran "
            "all of it alone. Put the training into a function and end the script with samestep.launch(main)."
        )


def _play_payload(job: payload.Payload, context: WorkerContext) -> None:
    """A worker's life after a launch call in another process."""
    if job.script is None:
        _mute_what_was_shown(context)
        main = payload.from_value(job.function)
        seat.take_part(context, main, Options.from_dict(job.options))
        return
    context.muted = Muted()
    job.script.run()
    context.unmute()
    raise UsageError(
        f"Each worker ran {job.script.path} again, but it ended before launch call number {len(job.earlier) + 1}, "
        "which your process made. Before launch() the script must do the same each time it runs: look for a condition "
        "on time, input or files."
    )


def _keep(program: script.Script) -> None:
    """Let all workers run the script as it is now: it may be edited meanwhile, and some of them start later."""
    program.keep()
    keep_lines(program.path)


def _mute_what_was_shown(context: WorkerContext) -> None:
    """Where workers before this one have died, drop what the script prints until it comes to where they were."""
    if context.snapshots is not None and context.snapshots.num_calls:
        context.muted = Muted()


def _title(program: script.Script | None) -> str:
    return os.path.basename(program.path) if program is not None else "samestep"


def _check_folder_of(summary_path: str | None) -> None:
    if summary_path is None:
        return
    folder = os.path.dirname(os.path.abspath(summary_path))
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise SettingsError(
            f"You set summary={summary_path}, but {folder} is not a folder one can write to. Make it, or name another."
        )
