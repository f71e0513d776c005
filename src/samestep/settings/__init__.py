"""Where words become objects: command line, environment and arguments to frozen options, options to a run.

    options      what can be set, in which order settings win, how many workers that makes
    origin       the code and the environment that a run comes from
    seat         a worker's part in a launch call
    audience     what the user is shown while a run goes on, and at its end
    farewell     what a run says that a signal has ended
    entry        the ways in: `launch`, `samestep run`, `samestep verify`, and the zygote of a `launch` elsewhere
    checkpoints  what `samestep checkpoint` does
    place        what `samestep meet` does

Nothing here imports torch before the environment has been prepared.
"""

from samestep.launching.runs import ask as ask_run
from samestep.launching.runs import find as find_run
from samestep.launching.runs import live as live_runs
from samestep.measure.comparison import SUSPECTS, first_difference
from samestep.settings.checkpoints import export_weights, stored_checkpoints
from samestep.settings.entry import Chaos, chaos_script, launch, run_script, serve, verify_script
from samestep.settings.options import Options, words_of
from samestep.settings.place import keep_place

__all__ = [
    "SUSPECTS",
    "Chaos",
    "Options",
    "ask_run",
    "chaos_script",
    "export_weights",
    "find_run",
    "first_difference",
    "keep_place",
    "launch",
    "live_runs",
    "run_script",
    "serve",
    "stored_checkpoints",
    "verify_script",
    "words_of",
]
