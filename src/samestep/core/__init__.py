"""One step's mechanism, seen from one worker. The eight hops of a step:

    worker 0 (replicas 0-3)      worker 1 (replicas 4-7)
    [1] seed    generators from (seed, step, pass, replica)                       randomness
    [2] shard   forward, loss, backward of one replica's shard                    the user's loop
    [3] fold    each gradient is added to this worker's nodes as it arrives       gradients, tree
        (1 to 3 again for every replica played here)
    [4] meet    losses, counts, used parameters; gradients are published          calls, group
    [5] reduce  owners add the workers' nodes along the rest of the tree          fold
    [6] clip    norms in float64, one factor for all (only if asked for)          agree.synchronous
    [7] update  owners run the optimizer on what they own, in place               update, places
    [8] commit  everyone sees the new weights                                     group, guard

A worker's time line, with where it waits for others (|):

    worker 0   1 2 3  1 2 3  1 2 3  1 2 3 |4 5 7 |8
    worker 1   1 2 3  1 2 3  1 2 3  1 2 3 |4 5 7 |8

Between steps, `snapshot` holds the newest state in memory that outlives the workers; `storage.checkpoint` in files.

Rooms below: `errors`, `units`, `data.split`, `storage`. Pure arithmetic without torch: `tree`, `layout`, `worker`.
"""
