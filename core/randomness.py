"""The integer hash behind all sampling: equal on every device and in every process.

SplitMix64's finaliser (Steele, Lea & Flood 2014, doi:10.1145/2660193.2660195).
"""

from __future__ import annotations

GAMMA = 0x9E3779B97F4A7C15
MIX1 = 0xBF58476D1CE4E5B9
MIX2 = 0x94D049BB133111EB
WORD = 1 << 64


def mix64(z: int) -> int:
    """Scramble a 64-bit word: a bijection whose every output bit depends on every input bit."""
    z = (z ^ (z >> 30)) * MIX1 % WORD
    z = (z ^ (z >> 27)) * MIX2 % WORD
    return z ^ (z >> 31)


def stream_key(seed: int, position: int) -> int:
    """The 64-bit word that the randomness of one token starts from."""
    return mix64((mix64(seed) + (position + 1) * GAMMA) % WORD)


def child_seed(seed: int, index: int) -> int:
    """The seed of a request's ``index``-th output: the request's own for the first. In 0 … 2⁶³ − 1."""
    return seed if index == 0 else mix64((seed + index * GAMMA) % WORD) >> 1
