"""What tests of GPU kernels share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def rng(seed: int) -> torch.Generator:
    """Random numbers where the kernels run: on the GPU, if one is here."""
    return torch.Generator("cuda" if torch.cuda.is_available() else "cpu").manual_seed(seed)
