"""Where a tensor of a published checkpoint goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Types in which checkpoints carry weights that are not quantised, and scales."""

Dummy = Callable[[tuple[int, ...], torch.Generator], Tensor]
"""Makes up a whole tensor of a shape, in a published type, on the generator's device."""


class Destination(NamedTuple):
    """The part of a checkpoint's tensor that a rank holds."""

    tensor: Tensor
    """The view of the model's memory that it fills."""
    shape: tuple[int, ...]
    """Of the whole tensor, in the checkpoint. () stands for [1] too."""
    dim: int = 0
    """Along which the part is cut out: 0 for rows, 1 for columns."""
    start: int = 0
    """Where the part begins."""
    size: int | None = None
    """How much of ``dim`` the part has. Default: what ``tensor`` has."""
    dtypes: tuple[torch.dtype, ...] = FLOATS
    """What the checkpoint may have it in."""
    convert: Callable[[Tensor], Tensor] | None = None
    """From the part, as published, to what ``tensor`` is a copy of; raises ValueError if it is not what it must be.
    Default: they are the same."""
    dummy: Dummy | None = None
    """How to make one up. Default: small random numbers."""
    optional: bool = False
    """Whether a checkpoint may be without it."""
    experts: tuple[int, ...] | None = None
    """Of a tensor of all experts: those that a rank has, in its order. Default: all, in the checkpoint's."""

    @property
    def stop(self) -> int:
        """Where the part ends."""
        return self.start + (self.tensor.shape[self.dim] if self.size is None else self.size)

    @property
    def is_whole(self) -> bool:
        """Whether the part is everything."""
        return not self.shape or (self.start == 0 and self.stop == self.shape[self.dim])

    def part_of(self, whole: Tensor) -> Tensor:
        """What of ``whole`` goes here: a view."""
        return whole if self.is_whole else whole.narrow(self.dim, self.start, self.stop - self.start)

    def fill(self, part: Tensor) -> None:
        """Copy a part, as published.

        Raises:
            ValueError: it is not what it must be.
        """
        if self.experts is not None:
            part = part[list(self.experts)]
        self.tensor.copy_(part if self.convert is None else self.convert(part.to(self.tensor.device)))
