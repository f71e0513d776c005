"""Starts the workers of a run on one host, watches them, and ends them together. Knows nothing of training.

    caller      the user's process (`python script.py`, a notebook): sends a payload, waits, gives back the result
    payload     what the workers shall run: a script by path, or a function by value
    zygote      the process that imports everything once and forks workers
    supervisor  the same process afterwards: watches its children until all have ended; does what is decided by
    coordinator what becomes of a fleet: a pure state machine, with the roster of who is in it
    events      what can happen to a fleet
    instructions what the supervisor is told to do about it
    context     what a forked worker knows of itself
    restarts    whether a fleet that lost a worker is started again
    signals     those that end a run, collected
    orders      what the supervisor orders the workers to do while they run
    writer      the process that writes a checkpoint beside training
    control     the door of a run, for its user's commands
    request     frames between such a command and a run
    runs        the runs that live on this host
    imports     libraries of the script, taken over by the zygote
    injector    faults on purpose, for `samestep chaos`
    verdict     how a run ends, decided from what its workers said and how they died
    leftovers   what workers leave behind, ended with the run
    channel     frames from worker to supervisor, and from zygote to caller
    script      a file run as `__main__`
    failure     the one error that a user sees
    output      where the prints of workers go
    environment what is read from, and set in, the environment of processes

The room is called `launching` because `samestep.launch` is the function.
"""
