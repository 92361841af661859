"""exp over a vector, in a form that a compiler turns into vector instructions; the library's scalar one it does not."""

from __future__ import annotations

import math

import numpy as np

from .compiled import compiled


@compiled
def exp_inplace(x: np.ndarray, bits: np.ndarray) -> None:
    """x ← eˣ within 2e-7 relative, for float32 in about ±87; smaller becomes 0 and larger saturates.

    eˣ = 2ᵏ · eʳ with k = round(x / ln 2); eʳ by the minimax polynomial of Cephes' expf (Moshier 1992).

    Args:
        x: [n] float32, overwritten.
        bits: [≥ n] int32 scratch.
    """
    powers = bits.view(np.float32)
    for i in range(len(x)):
        v = min(max(x[i], np.float32(-87.0)), np.float32(88.0))
        k = np.float32(math.floor(v * np.float32(1.44269504) + np.float32(0.5)))
        r = v - k * np.float32(0.693359375)
        r = r - k * np.float32(-2.12194440e-4)
        p = np.float32(1.9875691500e-4)
        p = p * r + np.float32(1.3981999507e-3)
        p = p * r + np.float32(8.3334519073e-3)
        p = p * r + np.float32(4.1665795894e-2)
        p = p * r + np.float32(1.6666665459e-1)
        p = p * r + np.float32(5.0000001201e-1)
        # A NaN passes through every comparison above as false: keep it.
        x[i] = p * r * r + r + np.float32(1) if x[i] == x[i] else x[i]
        bits[i] = (np.int32(k) + np.int32(127)) << np.int32(23)
    for i in range(len(x)):
        x[i] *= powers[i]
