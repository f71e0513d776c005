"""What outlives a process: values and tensors as bytes, their digests, checkpoints, and the ledger of committed calls.

wire             plain values and tensors as a frame of bytes, without pickle
digest           hashes of tensors and states
tensor_file      tensors in a file, each with its digest
checkpoint_file  small files written and read so that a crash at any point is seen
checkpoint       a directory per step, published by one rename, verified when read
stock            lists, verifies and exports what lies in a run's folder
ledger           the committed calls of a run, which a replay reads
"""
