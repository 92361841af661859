"""Rotary position tables, with the published ways to stretch them to longer contexts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...core.errors import ConfigError

SUPPORTED = ("default", "linear", "llama3", "yarn")


def cos_sin_table(rope: Mapping[str, Any], head_dim: int, max_positions: int, trained_positions: int) -> Tensor:
    """Cosines and sines of every position.

    Args:
        rope: `rope_parameters` of a config.json: rope_type, rope_theta, and the type's own keys.
        head_dim: of one attention head.
        max_positions: rows of the table.
        trained_positions: `max_position_embeddings`, the default of `original_max_position_embeddings`.

    Returns:
        [max_positions, head_dim] float32: cosines of head_dim / 2 frequencies, then their sines.

    Raises:
        ConfigError: an unknown rope_type.
    """
    kind = rope.get("rope_type", "default")
    theta = float(rope.get("rope_theta", 10000.0))
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    inverse = 1.0 / theta**exponents
    attention_factor = 1.0
    if kind == "linear":
        inverse = inverse / float(rope["factor"])
    elif kind == "llama3":
        inverse = _llama3(inverse, rope)
    elif kind == "yarn":
        inverse, attention_factor = _yarn(inverse, rope, theta, head_dim, trained_positions)
    elif kind != "default":
        raise ConfigError(f"config.json: rope_type {kind!r} is not supported", fix=f"supported: {', '.join(SUPPORTED)}")
    angles = torch.arange(max_positions, dtype=torch.int64).float().unsqueeze(1) * inverse
    return torch.cat((angles.cos(), angles.sin()), dim=1) * attention_factor


def _llama3(inverse: Tensor, rope: Mapping[str, Any]) -> Tensor:
    """Llama 3.1: slow frequencies are divided by the factor, fast ones kept, those between interpolated."""
    factor, low, high = float(rope["factor"]), float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    original = float(rope["original_max_position_embeddings"])
    wavelength = 2 * math.pi / inverse
    smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * inverse / factor + smooth * inverse


def _yarn(
    inverse: Tensor, rope: Mapping[str, Any], theta: float, head_dim: int, trained_positions: int
) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): interpolate by frequency, and sharpen attention."""
    original = float(rope.get("original_max_position_embeddings") or trained_positions)
    factor = float(rope.get("factor") or trained_positions / original)

    def scale(by: float, mscale: float = 1.0) -> float:
        return 1.0 if by <= 1 else 0.1 * mscale * math.log(by) + 1.0

    attention_factor = rope.get("attention_factor")
    if attention_factor is None:
        mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
        attention_factor = scale(factor, mscale) / scale(factor, all_dim) if mscale and all_dim else scale(factor)

    def dimension(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(float(rope.get("beta_fast") or 32)), dimension(float(rope.get("beta_slow") or 1))
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = ((torch.arange(head_dim // 2).float() - low) / max(high - low, 0.001)).clamp(0, 1)
    return inverse / factor * ramp + inverse * (1 - ramp), float(attention_factor)
