"""Python's search for garbage."""

from __future__ import annotations

import gc


def settle() -> None:
    """What is there now stays: leave it out of searches from now on. Blocks for some tenths of a second.

    Libraries make hundreds of thousands of objects. To look through them all, as Python does now and then, stops a
    process for a quarter of a second, and with it every stream.
    """
    gc.collect()
    gc.freeze()
