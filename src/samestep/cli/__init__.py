"""The command line: `samestep run`, `samestep verify`.

commands   words to calls
report     the outcome of `verify` as a table
"""
