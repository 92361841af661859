"""What tests of GPU kernels share."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from tandem.kernels import on_gpu

LEAST = 16
"""Rows, columns and depth that a product of tiles has at least, for tensor cores to take it."""


@pytest.fixture
def rng(seed: int) -> torch.Generator:
    """Random numbers where the kernels run: on the GPU, if one is here."""
    return torch.Generator("cuda" if torch.cuda.is_available() else "cpu").manual_seed(seed)


@pytest.fixture(autouse=True)
def tiles_for_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter multiplies tiles of any size; Triton refuses small ones on a GPU. So does every test here."""
    if not on_gpu.AVAILABLE:
        return
    builder = importlib.import_module("triton.runtime.interpreter").InterpreterBuilder
    create_dot = builder.create_dot

    def checked(self: Any, a: Any, b: Any, *others: Any) -> Any:
        sizes = [*a.data.shape[-2:], b.data.shape[-1]]
        assert min(sizes) >= LEAST, f"a product of {a.data.shape} with {b.data.shape}"
        return create_dot(self, a, b, *others)

    monkeypatch.setattr(builder, "create_dot", checked)
