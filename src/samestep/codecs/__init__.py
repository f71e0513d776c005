"""How one tensor of one replica is written as fewer bytes. Pure: what is encoded is a function of (tensor, key, state).

codec      what every codec is
noise      random numbers under a key
exact      `Exact`                4 bytes per element
half       `BFloat16` `Float16`   2
integer    `Int8` `Int4`          1 and 1/2, and a scale per block
sign       `Sign`                 1/8, and a scale per block or tensor
sparse     `TopK` `RandomK`       the bytes of a share of the elements
power      `PowerSGD`             two thin matrices
feedback   `Feedback`             a codec whose losses are added to the next round
"""

from __future__ import annotations

from samestep.codecs.codec import Codec, Key, State
from samestep.codecs.exact import Exact
from samestep.codecs.feedback import Feedback
from samestep.codecs.half import BFloat16, Float16
from samestep.codecs.integer import Int4, Int8
from samestep.codecs.power import PowerSGD
from samestep.codecs.sign import Sign
from samestep.codecs.sparse import RandomK, TopK

__all__ = [
    "BFloat16",
    "Codec",
    "Exact",
    "Feedback",
    "Float16",
    "Int4",
    "Int8",
    "Key",
    "PowerSGD",
    "RandomK",
    "Sign",
    "State",
    "TopK",
]
