"""How replicas agree. One file each: a frozen recipe, and the live form that `bind` makes of it.

synchronous   every step: one update from the mean of all replicas' gradients
stale         likewise, but gradients may be of weights that lack the latest updates, and nobody waits for the slowest
local         every replica steps by itself; all agree every so many steps
"""
