"""What the user's script holds.

recipe       what the result is a function of
run          `Run`: replicate, steps, mean, gather, once, edit, save, load
step         `Step`: shards, backward, update
evaluation   exact evaluation over a data set, divided among workers
keeper       when state is written down, and how a run goes on from it
background   checkpoints that are written beside training
archive      a run's state to a checkpoint and back
reporter     where progress goes
"""
