"""Products of few rows against torch's: odd shapes, biases, strides, gates; the same bits every time.

On a GPU the kernels run as they are; elsewhere Triton's interpreter runs the same source, in float32 and float16.
"""

from __future__ import annotations

import operator

import pytest
import torch
from tandem.kernels import gated_linear, linear, on_gpu, small_linear
from tandem.kernels.small_linear import PLANS, Gemv, Tile, multiply, plan_for

pytestmark = pytest.mark.skipif(not on_gpu.AVAILABLE, reason="Triton is not installed")

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
# The interpreter's bfloat16 products are wrong.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}

GEMVS = [Gemv(1, 2, 64, 4, 1), Gemv(2, 4, 32, 4, 1), Gemv(4, 4, 64, 2, 3)]
TILES = [Tile(16, 32, 1, 4, 3, False), Tile(32, 64, 3, 4, 4, False), Tile(64, 32, 1, 4, 3, True)]
PLANS_TRIED = [*GEMVS, *TILES, Tile(64, 32, 4, 4, 3, True)]


def random(rng: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=rng, device=DEVICE).to(dtype)


def arguments(
    rng: torch.Generator, tokens: int, outputs: int, inputs: int, dtype: torch.dtype, biased: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Rows of x and of the weight lie apart, and what is between them is poison."""
    x = torch.full((tokens, inputs + 5), torch.nan, dtype=dtype, device=DEVICE)[:, :inputs]
    weight = torch.full((outputs, inputs + 3), torch.nan, dtype=dtype, device=DEVICE)[:, :inputs]
    x.copy_(random(rng, tokens, inputs))
    weight.copy_(random(rng, outputs, inputs) / inputs**0.5)
    return x, weight, random(rng, outputs, dtype=dtype) if biased else None


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    error = (got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-6)
    assert error <= TOLERANCE[got.dtype], f"relative error {error:.1e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plan", PLANS_TRIED)
@pytest.mark.parametrize(
    ("tokens", "outputs", "inputs", "biased"),
    [(1, 2, 1, True), (3, 34, 70, False), (6, 40, 128, True), (19, 10, 97, False)],
)
def test_every_plan(
    rng: torch.Generator,
    plan: Gemv | Tile,
    tokens: int,
    outputs: int,
    inputs: int,
    biased: bool,
    dtype: torch.dtype,
) -> None:
    x, weight, bias = arguments(rng, tokens, outputs, inputs, dtype, biased)
    close(multiply(x, weight, bias, plan), linear.reference(x, weight, bias))
    close(multiply(x, weight, bias, plan, gated=True), gated_linear.reference(x, weight, bias))


@pytest.mark.parametrize("tokens", [33, 64])
def test_a_tile_of_64_tokens(rng: torch.Generator, tokens: int) -> None:
    x, weight, bias = arguments(rng, tokens, 40, 200, torch.float16, True)
    for plan in TILES:
        close(multiply(x, weight, bias, plan), linear.reference(x, weight, bias))


def test_columns_apart(rng: torch.Generator) -> None:
    """An x whose columns lie apart is copied."""
    x, weight, _ = arguments(rng, 64, 20, 3, torch.float32, False)
    tall = x.t()
    weight = random(rng, 6, 64)
    close(multiply(tall, weight, None, GEMVS[1]), linear.reference(tall, weight))


@pytest.mark.parametrize("tokens", [0, 1, 2, 5, 17, 40, 70])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_operations(rng: torch.Generator, tokens: int, dtype: torch.dtype) -> None:
    """Whatever plan the table gives, or none."""
    x, weight, bias = arguments(rng, tokens, 24, 160, dtype, True)
    close(linear.fused(x, weight, bias), linear.reference(x, weight, bias))
    if tokens <= small_linear.MAX_TOKENS or CUDA:
        close(gated_linear.fused(x, weight), gated_linear.reference(x, weight))


def test_the_same_bits(rng: torch.Generator) -> None:
    x, weight, bias = arguments(rng, 4, *((48, 600) if CUDA else (20, 200)), torch.float16, True)
    for plan in PLANS_TRIED:
        first = multiply(x, weight, bias, plan)
        for _ in range(10 if CUDA else 2):
            assert multiply(x, weight, bias, plan).equal(first)


def test_the_table() -> None:
    """Every entry can be reached."""
    for index, entry in enumerate(PLANS):
        assert entry.max_tokens <= small_linear.MAX_TOKENS
        limits = entry[:3]
        assert not any(all(map(operator.ge, before[:3], limits)) for before in PLANS[:index])
        x = torch.empty(1, dtype=torch.bfloat16).expand(entry.max_tokens, min(entry.max_inputs, 1 << 20))
        weight = x[:1].expand(min(entry.max_outputs, 1 << 20), -1)
        assert plan_for(x, weight) == entry.plan
    x = torch.empty(small_linear.MAX_TOKENS + 1, 16)
    assert plan_for(x, x) is None


@pytest.mark.skipif(not CUDA, reason="the interpreter would take minutes")
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 7, 16, 17, 32, 50, 64])
@pytest.mark.parametrize(
    ("outputs", "inputs"), [(128, 2048), (768, 4096), (4096, 12288), (24576, 3584), (151936, 1024)]
)
def test_the_sizes_of_models(rng: torch.Generator, tokens: int, outputs: int, inputs: int) -> None:
    """As a step uses them: bfloat16, the table's plan, recorded in a graph."""
    x, weight, bias = arguments(rng, tokens, outputs, inputs, torch.bfloat16, True)
    calls = [lambda: linear.fused(x, weight, bias), lambda: gated_linear.fused(x, weight)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = [call() for call in calls]
    x.copy_(random(rng, tokens, inputs))
    graph.replay()
    close(got[0], linear.reference(x, weight, bias))
    close(got[1], gated_linear.reference(x, weight))
