"""Memory for a rank's parameters: plain tensors, or packed ones where the checkpoint is quantised."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...core.errors import ConfigError
from ...kernels.schemes.packed import Weight
from .quantization import Quantization


class Parameters:
    """Makes uninitialised parameters.

    Args:
        dtype: of what is not quantised.
        matrix_dtype: of such matrices.
        device: where.
        quantization: of the checkpoint, or None.
        num_ranks: that share the model.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        matrix_dtype: torch.dtype,
        device: torch.device,
        quantization: Quantization | None,
        num_ranks: int,
    ) -> None:
        self._dtype = dtype
        self._matrix_dtype = matrix_dtype
        self._device = device
        self._quantization = quantization
        self._num_ranks = num_ranks

    def on(self, device: torch.device) -> Parameters:
        """The same for another device."""
        return Parameters(self._dtype, self._matrix_dtype, device, self._quantization, self._num_ranks)

    def __call__(self, *shape: int) -> Tensor:
        """A plain tensor: a vector, or matrices."""
        return torch.empty(shape, dtype=self._dtype if len(shape) == 1 else self._matrix_dtype, device=self._device)

    def matrix(
        self,
        prefix: str,
        modules: Sequence[str],
        parts: Sequence[int],
        columns: int,
        *,
        cut_columns: bool = False,
        num_experts: int | None = None,
    ) -> Weight:
        """What one or several linear modules, one below the other, multiply with.

        Args:
            prefix: before the modules' names in the checkpoint.
            modules: their names.
            parts: rows that this rank has of each.
            columns: that it has.
            cut_columns: whether those are a part of the columns.
            num_experts: how many there are of it, or None: it is no expert's.

        Raises:
            ConfigError: groups or blocks do not divide what a rank has, or not all modules are quantised.
        """
        kinds = {self._quantization.scheme_of(prefix + name) if self._quantization else None for name in modules}
        leading = () if num_experts is None else (num_experts,)
        if len(kinds) > 1:
            raise ConfigError(
                f"quantization_config: of {prefix}{', '.join(modules)}, which are computed together, some are "
                "quantised; expected all or none"
            )
        [scheme] = kinds
        if scheme is None:
            return self(*leading, sum(parts), columns)
        try:
            return scheme.allocate(
                lambda shape, dtype: torch.empty((*leading, *shape), dtype=dtype, device=self._device),
                parts, columns, columns * self._num_ranks if cut_columns else columns,
            )  # fmt: skip
        except ValueError as error:
            name = f"{prefix}{modules[0]}"
            raise cannot_divide(name, error, self._num_ranks) from None


def cannot_divide(name: str, error: ValueError, num_ranks: int) -> ConfigError:
    """The error that names a module whose groups or blocks are cut through."""
    fix = "fewer ranks, so that groups and blocks stay whole" if num_ranks > 1 else ""
    among = f" among {num_ranks} ranks" if num_ranks > 1 else ""
    return ConfigError(f"{name}: cannot be quantised as config.json says{among}: {error}", fix=fix)
