"""What a run cost, and where it stands.

progress     one line that tells how far a run is
summary      what a run did, in words that anyone understands
comparison   where the traces of two runs part
"""
