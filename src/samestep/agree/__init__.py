"""How replicas agree. One file each: a frozen recipe, and the live form that `bind` makes of it.

synchronous   every step: one update from the mean of all replicas' gradients, as they are or through a codec
stale         likewise, but gradients may be of weights that lack the latest updates, and nobody waits for the slowest
local         every replica steps by itself; all agree every so many steps
federated     rounds over clients, each of which trains on data of its own

agreement     what they have in common            meeting, reduction, leaves    what synchronous steps are made of
allowance, nonfinite   what may be left out       apart, own, round, outer, coding   local steps
guest, pooling   federated rounds                 pipeline, versions, shelf, schedule, maker, board, courier   stale
"""
