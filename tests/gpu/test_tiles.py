"""Whatever the sizes, products are cut into tiles that tensor cores take: Triton refuses others on a GPU."""

from __future__ import annotations

import pytest
import torch
from tandem.kernels import moe_packed, moe_sorted, on_gpu, packed_linear, small_linear
from tandem.kernels.expert_weights import ExpertWeights

pytestmark = pytest.mark.skipif(not on_gpu.AVAILABLE, reason="Triton is not installed")

LEAST = 16
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tables(dtype: torch.dtype) -> None:
    for products in (moe_sorted.PLAIN, moe_packed._PACKED, moe_packed._QUADS):
        for pairs in (1, 7, 64, 500, 5000, 100_000):
            for tile in products.entry(pairs, 8, dtype)[1:]:
                assert min(tile.rows, tile.columns, tile.depth) >= LEAST
    for tokens in (1, 3, 16, 17, 64, 1000):
        for outputs in (1, 100, 10_000):
            plan = packed_linear.plan_for(tokens, outputs, dtype)
            assert isinstance(plan, packed_linear.Gemv) or min(plan.tokens, plan.rows, plan.depth) >= LEAST
    assert all(min(plan.tokens, plan.rows, plan.depth // 4) >= LEAST for *_, plan in packed_linear.QUADS)
    plans = [entry.plan for entry in small_linear.PLANS]
    assert all(min(plan.rows, plan.depth) >= LEAST for plan in plans if isinstance(plan, small_linear.Tile))
    assert small_linear.step_depth(3, 1024) >= LEAST


@pytest.mark.parametrize(("hidden", "inner"), [(1, 1), (3, 5), (17, 9), (40, 23)])
@pytest.mark.parametrize("tokens", [1, 5])
def test_experts_of_odd_sizes(hidden: int, inner: int, tokens: int, rng: torch.Generator) -> None:
    """The fixture of this folder looks at every product."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng, device=DEVICE)

    experts = ExpertWeights(random(4, 2 * inner, hidden), random(4, hidden, inner))
    ids = torch.randint(-1, 4, (tokens, 2), generator=rng, device=DEVICE)
    x, weights = random(tokens, hidden), torch.rand(tokens, 2, generator=rng, device=DEVICE)
    want = moe_sorted.fused_experts(x, weights, ids, experts)
    each = moe_sorted.fused_each(x, weights, ids.int(), experts, 1)
    torch.testing.assert_close(torch.where((ids >= 0).unsqueeze(-1), each, 0).sum(1), want)
