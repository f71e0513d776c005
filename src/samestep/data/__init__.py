"""Which sample goes where, and how it gets there.

    permutation   the order of an epoch: a pure function of (number of samples, key)
    split         positions of that order -> steps -> shards
    source        anything that holds samples -> the batch of one shard
    loading       requests for shards -> shards, read here or ahead in loader processes
    proof         sample ids that were read -> "each sample exactly once"
    fingerprint   a source -> digests of a few samples, to tell whether it changed

Below them: `mixing` (64-bit hashing), `tensors` (trees of tensors, alignment), `shard` (a request and its answer),
`loader` (one process that reads ahead) and `parcel` (how tensors come from it).

`mixing`, `permutation`, `split` and `proof` import no torch: the planner and the tests use them as training does.
"""
