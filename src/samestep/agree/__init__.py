"""How replicas agree. One file each: a frozen recipe, and the live form that `bind` makes of it.

synchronous   every step: one update from the mean of all replicas' gradients
"""
