"""A weight in fewer bits than the model computes in: dequantised where it is used, never as a whole in advance."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, Self, cast

import torch
from torch import Tensor

from .destination import Destination

Make = Callable[[tuple[int, ...], torch.dtype], Tensor]
"""An uninitialised tensor of a shape and type."""


@dataclasses.dataclass(frozen=True, eq=False)
class Packed(ABC):
    """A matrix [rows, columns], or one for each expert.

    All tensors of the latter begin with the dimension of experts and `tensors` lists them, so that whoever moves an
    expert moves all of it.
    """

    parts: tuple[int, ...]
    """Rows of each published matrix; they lie one below the other."""
    columns: int
    codes: Tensor
    """[rows, columns], or fewer where a byte holds several."""
    scales: Tensor

    @property
    def rows(self) -> int:
        """Of all parts."""
        return sum(self.parts)

    def start_of(self, part: int) -> int:
        """The first row of a part."""
        return sum(self.parts[:part])

    def tensors(self) -> dict[str, Tensor]:
        """What it is made of, by name."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if isinstance(value, Tensor)}

    def __getitem__(self, expert: int) -> Self:
        """One expert's: views."""
        parts = {name: tensor[expert] for name, tensor in self.tensors().items()}
        return dataclasses.replace(self, **parts)  # type: ignore[arg-type]

    def __len__(self) -> int:
        """Rows; of several experts, how many there are."""
        return len(next(iter(self.tensors().values())))

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @abstractmethod
    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The matrix, [rows, columns] or [experts, rows, columns], in a floating type of at least 16 bits."""


Weight = Tensor | Packed
"""What a product multiplies with."""


class Cut(NamedTuple):
    """A part of a published matrix [rows, columns]."""

    rows: int
    """Of the whole."""
    columns: int
    first_row: int
    num_rows: int
    first_column: int
    num_columns: int

    @property
    def along_columns(self) -> bool:
        """Whether the part is some of the columns, of all rows."""
        return self.num_columns < self.columns


class Scheme(Protocol):
    """A published layout, with its parameters. Pure but for the tensors that it makes."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def only_experts(self) -> bool:
        """Whether it is for the experts of a mixture and nothing else, all of them in one tensor."""

    def allocate(self, make: Make, parts: Sequence[int], columns: int, whole_columns: int) -> Packed:
        """Memory for matrices of ``parts`` rows each, one below the other.

        Args:
            make: called with shapes of one expert's tensors.
            parts: rows that a rank has of each published matrix.
            columns: that it has.
            whole_columns: of the published matrices.

        Raises:
            ValueError: groups or blocks do not divide them.
        """

    def destinations(self, weight: Packed, part: int, cut: Cut) -> dict[str, Destination]:
        """What fills a part of ``weight``: what follows the module's name in the checkpoint → where it goes.

        Raises:
            ValueError: the cut goes through a group or a block.
        """


def scale_groups(numbers: Tensor, scales: Tensor, size: int) -> Tensor:
    """Each ``size`` columns of [rows, columns] times their scale of [rows, groups]; the last group may be smaller."""
    columns = numbers.shape[-1]
    if columns % size:
        return numbers * scales.repeat_interleave(size, -1)[..., :columns]
    grouped = numbers.unflatten(-1, (-1, size)) * scales.unsqueeze(-1)
    return cast(Tensor, grouped.flatten(-2))


def check_multiple(what: str, found: int, unit: int) -> None:
    """Refuse a size that a group or block does not divide.

    Raises:
        ValueError: with both.
    """
    if found % unit:
        raise ValueError(f"{what}: expected a multiple of {unit}, found {found}")


def finite(scales: Tensor) -> Tensor:
    """``scales``, if they are numbers.

    Raises:
        ValueError: one is NaN or infinite.
    """
    wrong = int((~torch.isfinite(scales.float())).sum())
    if wrong:
        raise ValueError(f"expected finite scales, found {wrong} of {scales.numel()} that are NaN or infinite")
    return scales


def constant(value: float, dtype: torch.dtype) -> Callable[[tuple[int, ...], torch.Generator], Tensor]:
    """A `Dummy` of one value."""
    return lambda shape, generator: torch.full(shape, value, dtype=dtype, device=generator.device)


def random_bits(dtype: torch.dtype) -> Callable[[tuple[int, ...], torch.Generator], Tensor]:
    """A `Dummy` of random bits; int32 or uint8."""
    low, high = (-(1 << 31), 1 << 31) if dtype == torch.int32 else (0, 256)
    return lambda shape, generator: torch.randint(
        low, high, shape, dtype=dtype, device=generator.device, generator=generator
    )
