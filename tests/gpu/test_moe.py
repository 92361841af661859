"""The mixture of experts against its reference: each way of computing it, whatever the number of tokens suggests.

On a GPU the kernels run as they are; elsewhere Triton's interpreter runs the same source, in float32 and float16.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from tandem.kernels import moe, moe_few, moe_sorted, on_gpu, routing
from tandem.kernels.expert_weights import ExpertWeights

pytestmark = pytest.mark.skipif(not on_gpu.AVAILABLE, reason="Triton is not installed")

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
# The interpreter's bfloat16 products are wrong.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}

FEW = [moe_few.Plan(16, 1, 64, 4, 1, 4, 32, 4, 1), moe_few.Plan(4, 3, 32, 2, 3, 1, 64, 2, 2)]


class Arguments(NamedTuple):
    """Of every version of the operation."""

    x: torch.Tensor
    router: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    top_k: int
    renormalize: bool


def arguments(
    rng: torch.Generator, tokens: int, experts: int, top_k: int, hidden: int, inner: int, dtype: torch.dtype
) -> Arguments:
    """Logits of a token are a quarter apart: rounding does not change its choice. Rows of x lie apart."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng, device=DEVICE)

    assert tokens <= hidden
    x = torch.full((tokens, hidden + 3), torch.nan, dtype=dtype, device=DEVICE)[:, :hidden]
    basis = torch.linalg.qr(random(hidden, hidden).double())[0][:tokens]
    x.copy_(basis * hidden**0.5)
    order = torch.stack([torch.randperm(experts, generator=rng, device=DEVICE) for _ in range(tokens)])
    router = (order.double() - experts / 2).T / 4 @ basis / hidden**0.5
    gate_up, down = random(experts, 2 * inner, hidden) / hidden**0.5, random(experts, hidden, inner) / inner**0.5
    return Arguments(x, router.to(dtype).contiguous(), gate_up.to(dtype), down.to(dtype), top_k, bool(tokens % 2))


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    error = (got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-6)
    assert error <= TOLERANCE[got.dtype], f"relative error {error:.1e}"


def with_biases(rng: torch.Generator, gate_up: torch.Tensor, down: torch.Tensor, dtype: torch.dtype) -> ExpertWeights:
    """Experts as gpt-oss has them, of which some go beyond the unit's clamps."""
    biases = [torch.randn(each.shape[:2], generator=rng, device=DEVICE).to(dtype) for each in (gate_up, down)]
    return ExpertWeights(gate_up, down, biases[0] * 5, biases[1], "clamped_swiglu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plan", FEW)
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "hidden", "inner"),
    [(1, 4, 2, 16, 8), (1, 128, 8, 64, 10), (3, 9, 3, 70, 33), (4, 40, 1, 128, 6)],
)
def test_few(
    rng: torch.Generator,
    plan: moe_few.Plan,
    tokens: int,
    experts: int,
    top_k: int,
    hidden: int,
    inner: int,
    dtype: torch.dtype,
) -> None:
    given = arguments(rng, tokens, experts, top_k, hidden, inner, dtype)
    close(moe_few.fused(*given, plan), moe.reference(*given))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "hidden", "inner"),
    [(1, 5, 2, 16, 8), (5, 40, 3, 40, 9), (16, 12, 8, 32, 17), (33, 12, 4, 48, 8)],
)
def test_sorted(
    rng: torch.Generator, tokens: int, experts: int, top_k: int, hidden: int, inner: int, dtype: torch.dtype
) -> None:
    given = arguments(rng, tokens, experts, top_k, hidden, inner, dtype)
    close(moe_sorted.fused(*given), moe.reference(*given))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "hidden", "inner"), [(1, 5, 2, 16, 8), (37, 12, 3, 40, 9), (3, 40, 8, 48, 17)]
)
def test_after_routing(
    rng: torch.Generator, tokens: int, experts: int, top_k: int, hidden: int, inner: int, dtype: torch.dtype
) -> None:
    """Experts of which this rank has some: half the pairs are nobody's here."""
    given = arguments(rng, tokens, experts, top_k, hidden, inner, dtype)
    own, other = ExpertWeights(given.gate_up, given.down), with_biases(rng, given.gate_up, given.down, dtype)
    weights = torch.rand(tokens, top_k, generator=rng, device=DEVICE)
    rows = [torch.randperm(2 * experts, generator=rng, device=DEVICE)[:top_k] for _ in range(tokens)]
    ids = (torch.stack(rows) - experts).clamp(min=-1)
    none = torch.full_like(ids, -1)
    ways = [moe_sorted.fused_experts, moe.fused_experts]
    for way in [*ways, *([] if tokens > 4 else [lambda *given: moe_few.fused_experts(*given, FEW[tokens // 2])])]:
        close(way(given.x, weights, ids, own), moe.reference_experts(given.x, weights, ids, own))
        assert way(given.x, weights, none, own).equal(torch.zeros_like(given.x))
    if experts < 40:
        close(moe.fused_experts(given.x, weights, ids, other), moe.reference_experts(given.x, weights, ids, other))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("experts", "rows"), [(3, 1), (5, 37)])
def test_rows_of_their_own(rng: torch.Generator, experts: int, rows: int, dtype: torch.dtype) -> None:
    """Each expert's tokens in rows of its own; what is in the others does not matter."""
    given = arguments(rng, 4, experts, 1, 24, 10, dtype)
    own = ExpertWeights(given.gate_up, given.down)
    x = torch.randn(experts, rows, 24, generator=rng, device=DEVICE).to(dtype)
    counts = torch.tensor([rows, 0, 1, *range(2, experts - 1)], device=DEVICE)
    inside = torch.arange(rows, device=DEVICE) < counts[:, None]
    want = moe.reference_batched(x, counts, own)
    x[~inside] = torch.nan
    close(moe_sorted.fused_batched(x, counts, own)[inside], want[inside])


@pytest.mark.parametrize(("tokens", "top_k"), [(1, 1), (7, 3), (16, 8), (13, 8)])
def test_sorting_at_once(rng: torch.Generator, tokens: int, top_k: int) -> None:
    """One program's routing is what many programs make of it, but for the order of an expert's pairs."""
    logits = torch.randn(tokens, 21, generator=rng, device=DEVICE)
    got = moe_sorted._sort(logits, top_k, True, 16)
    limit, moe_sorted._MAX_AT_ONCE = moe_sorted._MAX_AT_ONCE, 0
    try:
        want = moe_sorted._sort(logits, top_k, True, 16)
    finally:
        moe_sorted._MAX_AT_ONCE = limit
    close(got.weights, want.weights)
    for name in ("starts", "counts", "ends"):
        assert getattr(got, name).equal(getattr(want, name))
    for start, count in zip(got.starts.tolist(), got.counts.tolist(), strict=True):
        part = slice(start, start + count)
        assert got.order[part].equal(want.order[part].sort().values)


def test_an_expert_for_all(rng: torch.Generator) -> None:
    given = arguments(rng, 1, 8, 2, 16, 6, torch.float32)
    for tokens in (2, 4, 40):
        same = given._replace(x=given.x.repeat(tokens, 1))
        close(moe_sorted.fused(*same), moe.reference(*same))
    close(moe_few.fused(*same._replace(x=same.x[:3])), moe.reference(*same._replace(x=same.x[:3])))


@pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning")
def test_a_broken_token_breaks_no_other(rng: torch.Generator) -> None:
    given = arguments(rng, 3, 16, 2, 32, 6, torch.float32)
    want = moe.reference(*given)
    given.x[1] = torch.nan
    for got in (moe_few.fused(*given), moe_sorted.fused(*given)):
        assert got[1].isnan().all()
        close(got[::2], want[::2])


def test_the_same_bits(rng: torch.Generator) -> None:
    given = arguments(rng, 4, 12, 4, 48, 20, torch.float16)
    for way in (moe_few.fused, moe_sorted.fused):
        first = way(*given)
        for _ in range(10 if CUDA else 2):
            assert way(*given).equal(first)


def test_which_way() -> None:
    assert moe_few.serves(1, 8, 2)
    assert not moe_few.serves(2, 8, 2), "two of Mixtral's tokens share an expert too often"
    assert moe_few.serves(4, 128, 8)
    assert not moe_few.serves(5, 128, 8)
    assert not moe_few.serves(1, 512, 8), "ranking would take longer than a launch"
    none = torch.empty(0, 16)
    assert moe.fused(none, torch.empty(4, 16), torch.empty(4, 8, 16), torch.empty(4, 16, 4), 2, True).shape == (0, 16)


@pytest.mark.parametrize("method", ["softmax", "topk_softmax"])
@pytest.mark.parametrize(("experts", "top_k"), [(128, 8), (12, 3), (5, 1), (1, 1)])
@pytest.mark.parametrize("renormalize", [False, True])
def test_routing_in_one_launch(rng: torch.Generator, method: str, experts: int, top_k: int, renormalize: bool) -> None:
    """As torch does it, rows that lie apart and rows of NaN included."""
    logits = torch.randn(9, experts + 3, generator=rng, device=DEVICE)[:, :experts]
    whole = list(range(9))
    if CUDA:  # the interpreter warns of them
        logits[whole.pop(4)] = torch.nan
    how = routing.Routing(method, top_k, renormalize, scale=2.5)
    assert routing.fuses(how, experts)
    weights, ids = routing.fused(logits, how)
    want = routing.METHODS[method](logits, how, None)
    assert not CUDA or weights[4].isnan().all()
    assert torch.equal(ids[whole], want[1][whole])
    torch.testing.assert_close(weights[whole], want[0][whole] * 2.5)
