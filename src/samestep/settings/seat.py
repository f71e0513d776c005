"""A worker's part in a launch call: how many take part, how they reach each other, then the user's function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from samestep.core.worker import Worker
from samestep.errors import SettingsError, UsageError
from samestep.launching import environment
from samestep.launching.channel import ChannelReporter
from samestep.launching.context import WorkerContext
from samestep.launching.imports import learned
from samestep.settings.options import Options
from samestep.settings.origin import origin_of

Main = Callable[[Any], Any]
"""The user's function; takes the `Run`."""


def play(main: Main, options: Options, group: Any, supervision: Any) -> tuple[Any, dict[str, Any]]:
    """Call the user's function with a run.

    Args:
        main: the function.
        options: complete settings.
        group: how this worker reaches the others.
        supervision: what ties this worker to its supervisor (`loop.supervision`).

    Returns:
        What the function returned, and the facts of the run (complete on the first worker).
    """
    import torch

    from samestep.core.memory import keep_freed, shortage_behind
    from samestep.core.randomness import seed_start
    from samestep.loop.run import Run
    from samestep.loop.session import Session

    keep_freed()
    recipe = options.recipe()
    torch.set_num_threads(recipe.threads)
    keeping = replace(options.keeping(), origin=origin_of(main, options.device))
    session = Session(recipe, keeping, group, supervision)
    seed_start(recipe.seed)
    try:
        result = main(Run(session))
    except Exception as error:
        for note in (session.whereabouts(), shortage_behind(error)):
            if note:
                error.add_note(f"samestep: {note}")
        raise
    return result, session.finish(result)


def take_part(context: WorkerContext, main: Main, asked: Options) -> Any:
    """Play a launch call in a forked worker. Returns what the user's function returned.

    Raises:
        SettingsError: settings clash.
        UsageError: launch calls that cannot work together.
    """
    number = context.num_calls
    context.num_calls += 1
    if context.is_playing:
        raise UsageError("launch() was called inside the function given to launch(). Call it once, from outside.")
    if number < len(context.earlier):
        return recorded(context.earlier[number])
    options = Options.from_dict(context.options).over(asked)
    seated = _seat(context, options)
    if context.group is None:
        context.group = _group(seated, context)
    # Of several launch calls in a script only the first is kept in memory: it is the one that a new fleet comes to.
    is_kept = number == len(context.earlier) and options.trace is None and options.protect is not False
    snapshots = context.snapshots if is_kept else None
    if seated.is_first and not context.joins:
        told = {"num_workers": seated.size, "run_folder": options.checkpoint, "options": options.to_dict()}
        watched = {"call": number, "hang_after": options.hang_after}
        kept = {"keeps_state": options.protect is not False, "can_scale": snapshots is not None}
        # Replicas that are workers would change with them.
        mends = snapshots is not None and options.recipe().replicas != "workers" and seated.device == "cpu"
        context.sender.send("seated", {**told, **watched, **kept, "survivors_go_on": mends})
        if snapshots is not None and (names := learned(context.known)):
            # So that workers which start again need not import them once more.
            context.sender.send("imports", {"names": names})
    from samestep.core.calls import Halted
    from samestep.loop.supervision import Supervision

    if not context.joins and (snapshots is None or not snapshots.num_calls):
        context.unmute()
    context.is_playing = True
    if context.pulse is not None:
        context.pulse.start()
    try:
        supervision = Supervision(
            reporter=ChannelReporter(context.sender, context.unmute, context.output, silent=context.joins),
            snapshots=snapshots,
            pulse=context.pulse,
            orders=context.orders,
            joins=context.joins,
            verifies=options.protect is not False,
            balances=options.balance is not False,
            writer=context.writer,
        )
        result, facts = play(main, options, context.group, supervision)
    except Halted:
        if context.group.worker.is_first:
            context.sender.send("halted")
        context.leave()
    context.is_playing = False
    context.joins = False
    if context.group.worker.is_first:
        blob, warning = packed(result) if context.leaves else (b"", "")
        told = {"call": number, "facts": _with_settings(facts, result, options), "warning": warning}
        context.sender.send("finished", told, blob)
    if context.leaves:
        context.leave()
    return result


def take_part_in_group(main: Main, asked: Options, audience: Any) -> Any:
    """Play a launch call in a process that torchrun, or a launcher like it, has started.

    Args:
        main: the user's function.
        asked: settings of the launch call.
        audience: makes a reporter for the first worker, and is told the facts at the end.

    Raises:
        SettingsError: settings clash, with each other or with the launcher's.
    """
    import torch.distributed

    from samestep.core.process_group import ProcessGroup
    from samestep.loop.supervision import Supervision

    worker = environment.launched_worker()
    if asked.workers is not None and asked.workers != worker.size:
        raise SettingsError(
            f"You set workers={asked.workers}, but the launcher started {worker.size} (WORLD_SIZE). Leave workers out "
            f"of launch(), or start {asked.workers}."
        )
    replace(asked, workers=worker.size, device=None).check()
    environment.prepare_running()
    device, staged = _device_of(asked.device, worker.local_rank, environment.num_local_workers())
    # A script on its way from DDP may have called init_process_group itself.
    join = ProcessGroup if torch.distributed.is_initialized() else ProcessGroup.join
    group = join(replace(worker, device=device), staged=staged)
    try:
        supervision = Supervision(
            reporter=audience.reporter(worker.is_first),
            verifies=asked.protect is not False,
            balances=asked.balance is not False,
        )
        result, facts = play(main, asked, group, supervision)
    finally:
        group.close()
    if worker.is_first:
        audience.finished(_with_settings(facts, result, asked))
    return result


def packed(result: Any) -> tuple[bytes, str]:
    """Return `result` as bytes for another process, and a warning if it cannot go there (then it is None)."""
    from samestep.storage import wire

    try:
        return wire.pack([result]), ""
    except TypeError as error:
        reason = str(error).replace("value[0]", "the result", 1)
        return wire.pack([None]), (
            f"samestep: what the function returned cannot be sent back, so launch() returns None: {reason} Save other "
            "things in the function (run.save, run.once), or use them there."
        )


def recorded(blob: bytes) -> Any:
    """Return the result of a launch call that the caller's process made before.

    Raises:
        SystemExit: that call failed, as it did there.
    """
    from samestep.storage import wire

    if not blob:
        raise SystemExit(1)
    return wire.unpack(blob)[0]


def _with_settings(facts: dict[str, Any], result: Any, options: Options) -> dict[str, Any]:
    """Return the facts of the summary, with what only this room knows."""
    import torch

    notes = list(facts.get("notes") or ())
    is_fixed = options.recipe().replicas != "workers"
    if not is_fixed:
        notes.append("replicas='workers': the result depends on the number of workers")
    return {**facts, "result": result, "notes": notes, "replicas_fixed": is_fixed, "torch": str(torch.__version__)}


def _seat(context: WorkerContext, options: Options) -> Worker:
    """Decide, as every worker does alone and alike, how many take part. Does not return in one that is not needed."""
    first_time = context.num_seated is None
    available = context.num_forked if context.num_seated is None else context.num_seated
    size = options.num_workers(available)
    if not first_time and size != available:
        raise UsageError(
            f"This script calls launch() with {available} workers and then with {size}. Give all its launch calls the "
            f"same number: --workers {min(size, available)}, or start it with `python`."
        )
    if size > available and context.rank == 0:
        context.sender.send("wants", {"num_workers": size})
    if size > available or context.rank >= size:
        context.leave()
    context.num_seated = size
    if not first_time:
        return context.group.worker
    device, _ = _device_of(options.device, 0, 1)
    rank, size = (0, 1) if context.joins else (context.rank, size)
    return Worker(rank=rank, size=size, local_rank=context.rank, device=device)


def _group(worker: Worker, context: WorkerContext) -> Any:
    if worker.size == 1 and not context.joins:
        from samestep.core.group import Solo

        return Solo(worker)
    from samestep.core.arena import Arena

    return Arena(worker, context.shared, context.give_up, context.joins)


def _device_of(kind: str | None, local_rank: int, num_local: int) -> tuple[str, bool]:
    """Return a worker's device, and whether GPUs are shared, so that tensors must cross through the host's memory."""
    if kind != "cuda":
        return "cpu", False
    import torch

    num_devices = torch.cuda.device_count()
    if num_devices == 0:
        raise SettingsError("You set device='cuda', but torch finds no GPU here. Use --device cpu, or leave it out.")
    return f"cuda:{local_rank % num_devices}", num_local > num_devices
