"""Words to calls. Nothing here imports torch: the environment must be set before that."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Callable
from importlib import metadata
from typing import Any

import click

from samestep.errors import SamestepError, SettingsError
from samestep.settings import (
    Options,
    chaos_script,
    export_weights,
    keep_place,
    run_script,
    stored_checkpoints,
    verify_script,
    words_of,
)

_SCRIPT_OPTIONS = (
    click.option("--replicas", metavar="R", help="Logical copies of the model (part of the recipe), or 'workers'."),
    click.option("--threads", type=int, metavar="T", help="Threads inside each worker (part of the recipe)."),
    click.option("--seed", type=int, metavar="S", help="Seed of every random number."),
    click.option("--device", metavar="KIND", help="cpu (default) or cuda."),
)


def _version() -> str:
    try:
        return metadata.version("samestep")
    except metadata.PackageNotFoundError:
        return "(a source tree that is not installed)"


def _with_script_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_SCRIPT_OPTIONS):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(_version(), prog_name="samestep", message="%(prog)s %(version)s")
def main() -> None:
    """Data-parallel training whose result does not depend on the machines."""


@main.command()
@click.argument("script")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.option("--workers", type=int, metavar="N", help="Processes to start; default one per core, at most R.")
@_with_script_options
@click.option("--checkpoint", metavar="DIR", help="Folder for checkpoints.")
@click.option("--every", metavar="N", help="Steps between checkpoints, or time: 30s, 10m, 2h.")
@click.option(
    "--async-checkpoints/--no-async-checkpoints",
    default=None,
    help="Write checkpoints beside training, or while it waits (default).",
)
@click.option("--resume", metavar="PATH", help="Checkpoint, or folder of them, to go on from.")
@click.option("--accept", metavar="KIND,...", help="What may differ from it: code, environment, data.")
@click.option(
    "--hang-after", type=float, metavar="S", help="Seconds without progress after which a worker is replaced; 0: never."
)
@click.option("--protect/--no-protect", default=None, help="Survive dead workers (default; takes memory), or not.")
@click.option(
    "--balance/--no-balance", default=None, help="Let replicas move away from slow workers (default), or not."
)
@click.option("--summary", metavar="FILE.json", help="Write the facts of the run there.")
def run(script: str, arguments: tuple[str, ...], summary: str | None, **settings: Any) -> None:
    """Run SCRIPT on this host. Its own arguments come after `--`."""

    def act() -> tuple[int, str]:
        return run_script(script, arguments, _options(settings), summary)

    _end(act)


@main.command()
@click.argument("script")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.option("--workers", default="1,2,3", show_default=True, metavar="N,N,...", help="Numbers of workers to compare.")
@click.option("--steps", default=20, show_default=True, metavar="N", help="Steps to run at each number.")
@_with_script_options
def verify(script: str, arguments: tuple[str, ...], workers: str, steps: int, **settings: Any) -> None:
    """Run SCRIPT's first steps at several numbers of workers and compare every tensor after each step."""

    def act() -> tuple[int, str]:
        from samestep.cli.report import report

        if steps < 1:
            raise SettingsError(f"You set --steps {steps}. Use 1 or more.")
        counts = _counts(workers)
        return report(verify_script(script, arguments, _options({**settings, "trace": steps}), counts)), ""

    _end(act)


@main.command()
@click.argument("script")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.option("--workers", type=int, metavar="N", help="Processes to start; default one per core, at most R.")
@click.option("--faults", default=20, show_default=True, metavar="N", help="Faults to inject.")
@click.option("--seed", default=0, show_default=True, metavar="S", help="Seed of when which fault strikes whom.")
@click.option("--replicas", metavar="R", help="Logical copies of the model (part of the recipe).")
def chaos(script: str, arguments: tuple[str, ...], faults: int, seed: int, **settings: Any) -> None:
    """Run SCRIPT undisturbed, then while its workers are killed, and compare every result."""

    def act() -> tuple[int, str]:
        from samestep.cli.chaos import report

        if faults < 1:
            raise SettingsError(f"You set --faults {faults}. Use 1 or more.")
        return report(chaos_script(script, arguments, _options(settings), faults, seed)), ""

    _end(act)


@main.group()
def checkpoint() -> None:
    """Look at checkpoints, verify them, take the weights out."""


@checkpoint.command("list")
@click.argument("folder")
def list_(folder: str) -> None:
    """List the checkpoints in FOLDER, by their manifests."""

    def act() -> tuple[int, str]:
        from samestep.cli.inventory import show_list

        return show_list(stored_checkpoints(folder, in_full=False)), ""

    _end(act)


@checkpoint.command("verify")
@click.argument("folder_or_step")
def verify_checkpoints(folder_or_step: str) -> None:
    """Read every byte; exit code 1 if any is damaged."""

    def act() -> tuple[int, str]:
        from samestep.cli.inventory import show_verified

        return show_verified(stored_checkpoints(folder_or_step, in_full=True)), ""

    _end(act)


@checkpoint.command()
@click.argument("folder_or_step")
@click.argument("out", metavar="OUT.safetensors")
def export(folder_or_step: str, out: str) -> None:
    """Write the newest good one's weights as plain safetensors."""

    def act() -> tuple[int, str]:
        from samestep.cli.inventory import show_export

        return show_export(export_weights(folder_or_step, out), out), ""

    _end(act)


@main.command()
@click.argument("at", metavar="HOST:PORT")
@click.option("--secret", metavar="FILE", help="File with the secret that the sites know too.")
@click.option("--keep", metavar="DIR", help="Folder for what is agreed on, so that a place started again goes on.")
def meet(at: str, secret: str | None, keep: str | None) -> None:
    """Be the meeting place of runs on several sites (samestep.Sites)."""

    def tell(text: str) -> None:
        print(text, flush=True)

    _end(lambda: (keep_place(at, secret, keep, tell), ""))


@main.command()
def ps() -> None:
    """List your live runs on this host."""
    from samestep.cli import steering

    _end(steering.listed)


@main.command()
@click.argument("run")
@click.option("--workers", type=int, required=True, metavar="N", help="Processes to go on with, at most R.")
@click.option("--timeout", default=60.0, show_default=True, metavar="SECONDS", help="How long to wait for it.")
def scale(run: str, workers: int, timeout: float) -> None:
    """Let a live RUN go on with another number of workers, after its step. The result does not change.

    RUN is its name, as `samestep ps` shows it, or the beginning of it.
    """
    from samestep.cli import steering

    _end(lambda: steering.scale(run, workers, timeout))


@main.command()
@click.argument("run")
@click.option("--timeout", default=60.0, show_default=True, metavar="SECONDS", help="How long to wait for its end.")
def stop(run: str, timeout: float) -> None:
    """End a live RUN after its step, with a checkpoint if it has a folder for them; like one Ctrl-C.

    RUN is its name, as `samestep ps` shows it, or the beginning of it.
    """
    from samestep.cli import steering

    _end(lambda: steering.stop(run, timeout))


def _options(settings: dict[str, Any]) -> Options:
    replicas = settings.get("replicas")
    if replicas is not None and replicas != "workers":
        if not replicas.lstrip("+-").isdecimal():
            raise SettingsError(f"You set --replicas {replicas}. Use a whole number, or 'workers'.")
        settings = {**settings, "replicas": int(replicas)}
    every = settings.get("every")
    if every is not None and every.isdecimal():
        settings = {**settings, "every": int(every)}
    if settings.get("accept") is not None:
        settings = {**settings, "accept": words_of(settings["accept"])}
    options = Options(**settings)
    options.check()
    return options


def _counts(text: str) -> list[int]:
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise SettingsError(f"You set --workers {text}. Use whole numbers of 1 or more with commas between: 1,2,3.")
    counts = list(dict.fromkeys(int(word) for word in words))
    if len(counts) < 2:
        raise SettingsError(f"You set --workers {text}. Name at least two numbers, to have something to compare: 1,2.")
    return counts


def _end(act: Callable[[], tuple[int, str]]) -> None:
    """Do it, print what went wrong in one piece, and exit."""
    try:
        code, message = act()
    except SettingsError as error:
        code, message = 2, f"samestep: {error}"
    except SamestepError as error:
        code, message = 1, f"samestep: {error}"
    except KeyboardInterrupt:
        code, message = 130, "samestep: SIGINT ended it."
    except SyntaxError as error:
        code, message = 1, "".join(traceback.format_exception_only(error)).rstrip()
    if message:
        with contextlib.suppress(OSError):
            print(message, file=sys.stderr)
    sys.exit(code)
