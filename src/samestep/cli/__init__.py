"""The command line: `samestep run`, `samestep verify`, `samestep checkpoint`.

commands   words to calls
report     the outcome of `verify` as a table
inventory  the checkpoints of a folder as a table
"""
