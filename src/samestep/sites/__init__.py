"""Runs on several sites that agree over slow links: each trains by itself, and they meet now and then.

table         whose contributions make which round: pure, no tensors
terms         what all sites must have set alike, as plain values and back
outer_state   the weights that all start from, and what a round makes of them
place         who takes part, what they bring, and when a round is made of it; kept on disk
departures    who has come to its end, on disk
proof         a shared secret, so that nobody else takes part
server        the place, over HTTP
visitor       a site's way there
errand        what it asks there, until it has an answer
baseline      the weights that its next contribution is measured from
site          what one site has of its own
recipe        `Sites`, and one worker's side
"""
