"""Products with quantised weights against their reference: every scheme, odd shapes, each plan.

On a GPU the kernels run as they are; elsewhere Triton's interpreter runs the same source, in float32 and float16.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tandem.kernels import moe, moe_packed, on_gpu, packed_linear, packed_quads
from tandem.kernels.expert_weights import ExpertWeights
from tandem.kernels.moe_packed import ByColumns, ByRows
from tandem.kernels.moe_sorted import Entry
from tandem.kernels.packed_linear import Gemv, QuadTile, Tile, multiply, plan_for
from tandem.kernels.schemes.fp8 import Fp8
from tandem.kernels.schemes.gptq import Gptq
from tandem.kernels.schemes.mxfp4 import Mxfp4
from tandem.kernels.schemes.packed import Packed

pytestmark = pytest.mark.skipif(not on_gpu.AVAILABLE, reason="Triton is not installed")

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
# The interpreter's bfloat16 products are wrong.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}

PLANS = [Gemv(1, 16, 64, 4), Gemv(2, 8, 128, 2), Tile(16, 32, 64, 1, 4, 3), Tile(16, 16, 128, 2, 4, 3)]
QUADS = [
    QuadTile(16, 32, 64, True, 1, 4, 3, 8),
    QuadTile(16, 16, 128, True, 2, 2, 4, 0),
    QuadTile(16, 64, 64, False, 1, 4, 3, 2),
    QuadTile(32, 128, 128, False, 2, 4, 3, 0),
]
ENTRIES = [
    Entry(1 << 40, ByColumns(16, 16, 64, 2, 3), ByColumns(16, 32, 64, 4, 3)),
    Entry(1 << 40, ByRows(16, 64, 64, 4, 3), ByRows(16, 64, 64, 4, 4)),
]
EXACT = {
    "fp8 blocks": (Fp8("block", (16, 64)), (21, 16), 200),
    "fp8 small blocks": (Fp8("block", (32, 16)), (32, 7), 97),
    "fp8 odd blocks": (Fp8("block", (8, 24)), (8, 8), 70),
    "fp8 rows": (Fp8("channel"), (13, 30), 131),
    "groups": (Gptq(32, True, False, scale_dtype=torch.float16), (24, 16), 192),
    "zeros": (Gptq(128, False, False), (40,), 256),
    "whole rows": (Gptq(-1, False, False), (40,), 104),
    "odd groups": (Gptq(24, False, False), (16,), 120),
    "wide groups": (Gptq(64, True, False, scale_dtype=torch.float16), (24, 16), 448),
    "wide rows": (Gptq(-1, False, False), (40,), 160),
    "any order": (Gptq(16, False, True), (24, 8), 96),
    "mxfp4": (Mxfp4(), (19, 20), 224),
}


def random_weight(rng: torch.Generator, name: str, *experts: int) -> Packed:
    """A scheme's memory, with random content whose products have a size of one; of experts, twice as many rows."""
    scheme, parts, columns = EXACT[name]
    parts = (sum(parts) // 8 * 8,) * 2 if experts else parts

    def make(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty((*experts, *shape), dtype=dtype, device=DEVICE)

    weight: Any = scheme.allocate(make, parts, columns, columns)
    size = columns**-0.5

    def uniform(like: torch.Tensor) -> torch.Tensor:
        return torch.rand(like.shape, generator=rng, device=DEVICE) + 0.5

    if isinstance(scheme, Fp8):
        weight.codes.copy_(numbers(rng, weight.codes.shape))
        weight.scales.copy_(uniform(weight.scales) * size / 100)
        return weight
    weight.codes.random_(0, 256, generator=rng)
    if isinstance(scheme, Mxfp4):
        weight.scales.random_(122, 126, generator=rng)
        return weight
    weight.scales.copy_(uniform(weight.scales) * size / 5)
    if weight.zeros is not None:
        weight.zeros.random_(0, 16, generator=rng)
    if weight.groups is not None:
        order = torch.randperm(columns, generator=rng, device=DEVICE) // weight.group_size
        weight.groups.copy_(order)
    return weight


def numbers(rng: torch.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    """Numbers that float8_e4m3fn has room for; beyond 448 it has but NaN."""
    return torch.randn(shape, generator=rng, device=DEVICE).mul_(100).clamp_(-448, 448)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    error = (got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-6)
    assert error <= TOLERANCE[got.dtype], f"relative error {error:.1e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EXACT)
def test_every_scheme_and_plan(rng: torch.Generator, name: str, dtype: torch.dtype) -> None:
    """Rows of x lie apart; against the product in float64 too."""
    weight = random_weight(rng, name)
    for number, plan in enumerate(PLANS):
        tokens = (1, 3, 5, 18)[number]
        x = torch.full((tokens, weight.columns + 5), torch.nan, dtype=dtype, device=DEVICE)[:, : weight.columns]
        x.copy_(torch.randn(x.shape, generator=rng, device=DEVICE))
        bias = torch.randn(weight.rows, generator=rng, device=DEVICE).to(dtype) if number % 2 else None
        got = multiply(x, weight, bias, plan)
        close(got, packed_linear.reference(x, weight, bias))
        exact = x.double() @ weight.dequantize(torch.float64).T + (0 if bias is None else bias.double())
        close(got, exact.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["zeros", "wide groups", "wide rows", "mxfp4"])
def test_quads(rng: torch.Generator, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """By each plan, and with Triton's own operations instead of instructions for pairs, where a GPU has them."""
    weight = random_weight(rng, name)
    assert packed_quads.serves(weight)
    for number, plan in enumerate(QUADS):
        tokens = (1, 18, 5, 33)[number]
        x = torch.full((tokens, weight.columns + 16), torch.nan, dtype=dtype, device=DEVICE)[:, : weight.columns]
        x.copy_(torch.randn(x.shape, generator=rng, device=DEVICE))
        bias = torch.randn(weight.rows, generator=rng, device=DEVICE).to(dtype) if number % 2 else None
        exact = x.double() @ weight.dequantize(torch.float64).T + (0 if bias is None else bias.double())
        close(multiply(x, weight, bias, plan), exact.to(dtype))
        with monkeypatch.context() as patched:
            patched.setattr(packed_quads, "pairs", lambda x, mxfp4: packed_quads.PLAIN)
            close(multiply(x, weight, bias, plan), exact.to(dtype))


@pytest.mark.parametrize("low", [66, 110, 180])
def test_powers_far_from_one(rng: torch.Generator, low: int) -> None:
    """Beyond what a product of all at once would have room for."""
    dtype = torch.bfloat16 if CUDA else torch.float32
    weight = random_weight(rng, "mxfp4")
    weight.scales.random_(low, low + 10, generator=rng)
    x = torch.randn(3, weight.columns, generator=rng, device=DEVICE).to(dtype)
    exact = x.double() @ weight.dequantize(torch.float64).T
    for plan in QUADS:
        got = multiply(x, weight, None, plan).double()
        assert (got - exact).norm() <= TOLERANCE[dtype] * exact.norm()


def test_whom_quads_serve(rng: torch.Generator) -> None:
    served = [name for name in EXACT if packed_quads.serves(random_weight(rng, name))]
    assert served == ["zeros", "wide groups", "wide rows", "mxfp4"]


def test_steps_of_quads(rng: torch.Generator) -> None:
    """They divide the columns if any do, and have one group each."""
    weight = random_weight(rng, "wide groups")  # 448 columns, groups of 64
    assert packed_quads.step_depth(weight, 256, 1) == 64
    weight = random_weight(rng, "zeros")  # 256 columns, groups of 128
    assert packed_quads.step_depth(weight, 256, 1) == packed_quads.step_depth(weight, 256, 2) == 128
    assert packed_quads.step_depth(weight, 256, 4) == 64
    weight = random_weight(rng, "mxfp4")  # 224 columns
    assert packed_quads.step_depth(weight, 128, 1) == 128
    assert packed_quads.step_depth(weight, 512, 1) == 256


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("name", EXACT)
def test_experts(rng: torch.Generator, name: str, dtype: torch.dtype) -> None:
    """Gate and up of each scheme, down of FP8 in blocks or MXFP4; a token's choice does not hang on rounding."""
    gate_up = random_weight(rng, name, 5)
    inner, hidden = gate_up.parts[0], gate_up.columns
    scheme: Any = Fp8("block", (16, 8), scale_name="weight_scale_inv")
    down: Any = scheme.allocate(
        lambda shape, dtype: torch.empty((5, *shape), dtype=dtype, device=DEVICE), [hidden], inner, inner
    )
    down.codes.copy_(numbers(rng, down.codes.shape))
    down.scales.copy_((torch.rand(down.scales.shape, generator=rng, device=DEVICE) + 0.5) / 100 / inner**0.5)
    for tokens in (1, 9) if CUDA else (9,):
        basis = torch.linalg.qr(torch.randn(hidden, hidden, generator=rng, device=DEVICE).double())[0][:tokens]
        x = (basis * hidden**0.5).to(dtype).contiguous()
        order = torch.stack([torch.randperm(5, generator=rng, device=DEVICE) for _ in range(tokens)])
        router = ((order.double() - 2).T / 4 @ basis / hidden**0.5).to(dtype).contiguous()
        given = x, router, gate_up, down, 2, name == "zeros"
        close(moe_packed.fused(*given), moe.reference(*given))
        for entry in ENTRIES:
            close(moe_packed.fused(*given, entry), moe.reference(*given))
    biases = [torch.randn(5, rows, generator=rng, device=DEVICE).to(dtype) for rows in (2 * inner, hidden)]
    own = ExpertWeights(gate_up, down)
    if name == "mxfp4":  # as gpt-oss has them, of which some go beyond the unit's clamps
        own = ExpertWeights(gate_up, down, 5 * biases[0], biases[1], "clamped_swiglu")
    # After the routing: half the pairs are another rank's.
    ids = torch.tensor([[0, -1], [-1, 4], [4, 2]], device=DEVICE)
    weights = torch.rand(3, 2, generator=rng, device=DEVICE)
    few = x.repeat(3, 1)[:3]
    close(moe_packed.fused_experts(few, weights, ids, own), moe.reference_experts(few, weights, ids, own))
    # Rows of each expert's own, of which some are no tokens.
    placed = few.repeat(5, 1, 1).contiguous()
    counts = torch.tensor([3, 0, 1, 2, 3], device=DEVICE)
    inside = torch.arange(3, device=DEVICE) < counts[:, None]
    want = moe.reference_batched(placed, counts, own)
    placed[~inside] = torch.nan
    close(moe_packed.fused_batched(placed, counts, own)[inside], want[inside])


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_experts_of_quads_alone(rng: torch.Generator, dtype: torch.dtype) -> None:
    """Gate, up and down, so that the second product's programs start before the first has ended."""
    gate_up: Any = random_weight(rng, "mxfp4", 5)
    inner, hidden = gate_up.parts[0], gate_up.columns
    down: Any = Mxfp4().allocate(
        lambda shape, dtype: torch.empty((5, *shape), dtype=dtype, device=DEVICE), [hidden], inner, inner
    )
    down.codes.random_(0, 256, generator=rng)
    down.scales.random_(122, 126, generator=rng)
    own = ExpertWeights(gate_up, down)
    x = torch.randn(9, hidden, generator=rng, device=DEVICE).to(dtype) / 16
    ids = torch.randint(-1, 5, (9, 2), generator=rng, device=DEVICE)
    weights = torch.rand(9, 2, generator=rng, device=DEVICE)
    want = moe.reference_experts(x, weights, ids, own)
    assert moe_packed._products(gate_up, down) is moe_packed._QUADS
    for entry in (None, *ENTRIES):
        close(moe_packed.fused_experts(x, weights, ids, own, entry), want)


@pytest.mark.parametrize("tokens", [0, 1, 2, 7, 40, 130])
def test_the_operation(rng: torch.Generator, tokens: int) -> None:
    """Whatever plan the table gives."""
    weight = random_weight(rng, "mxfp4")
    for dtype in DTYPES:
        x = torch.randn(tokens, weight.columns, generator=rng, device=DEVICE).to(dtype)
        close(packed_linear.fused(x, weight), packed_linear.reference(x, weight))


def test_the_same_bits(rng: torch.Generator) -> None:
    weight = random_weight(rng, "wide rows")
    x = torch.randn(4, weight.columns, generator=rng, device=DEVICE).half()
    for plan in (*PLANS, *QUADS):
        first = multiply(x, weight, None, plan)
        for _ in range(10 if CUDA else 2):
            assert multiply(x, weight, None, plan).equal(first)


def test_the_table() -> None:
    assert isinstance(plan_for(1, 4096, torch.bfloat16), Gemv)
    assert plan_for(100_000, 4096, torch.bfloat16) == packed_linear.PLANS[-1].plan
    assert plan_for(100_000, 4096, torch.float32) != packed_linear.PLANS[-1].plan


def test_the_table_of_quads(rng: torch.Generator) -> None:
    weight = random_weight(rng, "mxfp4")
    for dtype, quads in ((torch.float16, True), (torch.bfloat16, True), (torch.float32, False)):
        for tokens in (1, 17, 100_000):
            plan = packed_linear.plan_of(torch.empty(tokens, 1, dtype=dtype), weight)
            assert isinstance(plan, QuadTile) == (quads and tokens < 100_000)
            assert isinstance(plan, QuadTile) or plan == plan_for(tokens, weight.rows, dtype)
    x = torch.empty(1, 1, dtype=torch.float16)
    assert packed_linear.plan_of(x, random_weight(rng, "any order")) == plan_for(1, 24, torch.float16)
