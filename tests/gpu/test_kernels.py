"""Triton kernels against their references: odd shapes, fresh random inputs, poisoned outputs, any strides.

On a GPU they run as they are; elsewhere Triton's interpreter runs the same source, in float32 and float16.
"""

from __future__ import annotations

import pytest
import torch
from tandem.kernels import activation, decode_inputs, host_copy, moe, on_gpu, rms_norm, rotary

pytestmark = pytest.mark.skipif(not on_gpu.AVAILABLE, reason="Triton is not installed")

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
# The interpreter's bfloat16 products are wrong.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def random(rng: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(shape, generator=rng, device=DEVICE)).to(dtype)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    error = (got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-6)
    assert error <= TOLERANCE[got.dtype], f"relative error {error:.1e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 1), (3, 7), (5, 256), (2, 1030), (0, 16)])
def test_rms_norm(rng: torch.Generator, tokens: int, hidden: int, dtype: torch.dtype) -> None:
    x, weight = random(rng, tokens, hidden, dtype=dtype), random(rng, hidden, dtype=dtype)
    residual = random(rng, tokens, hidden + 3, dtype=dtype)[:, :hidden]
    for before in (None, residual):
        want = rms_norm.reference(x, before, weight, 1e-5)
        got = rms_norm.fused(x.clone(), None if before is None else before.clone(), weight, 1e-5)
        close(got[0], want[0])
        close(got[1], want[1])


@pytest.mark.parametrize("count", [0, 1, 1024, 2500])
def test_host_copy(rng: torch.Generator, count: int) -> None:
    source = torch.randint(-(1 << 62), 1 << 62, (count + 1,), generator=rng, device=DEVICE)
    got = torch.full((count + 2,), -1, device=DEVICE)
    host_copy.fused(source[1:], got[1:-1])
    want = torch.full_like(got, -1)
    host_copy.reference(source[1:], want[1:-1])
    assert got.tolist() == want.tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "inner"), [(1, 1), (3, 80), (2, 1500)])
def test_silu_mul(rng: torch.Generator, tokens: int, inner: int, dtype: torch.dtype) -> None:
    gate_up = random(rng, tokens, 2 * inner, dtype=dtype)
    close(activation.fused(gate_up), activation.reference(gate_up))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_tokens"), [(8, 2, 32, 16), (3, 1, 2, 1), (6, 6, 10, 8), (4, 2, 128, 16)]
)
@pytest.mark.parametrize("norm", [False, True])
def test_rotary(
    rng: torch.Generator, heads: int, kv_heads: int, head_dim: int, block_tokens: int, norm: bool, dtype: torch.dtype
) -> None:
    qkv = random(rng, 7, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    weights = random(rng, head_dim, dtype=dtype), random(rng, head_dim, dtype=dtype)
    head_norm = rotary.HeadNorm(*weights, 1e-6) if norm else None
    table = random(rng, 50, head_dim)
    positions = torch.randint(0, 50, (7,), generator=rng, device=DEVICE)
    cache = torch.full((12, 3, 2, kv_heads, block_tokens, head_dim), torch.nan, dtype=dtype, device=DEVICE)
    other = cache.clone()
    slots = torch.randperm(12 * block_tokens, generator=rng, device=DEVICE)[:7]
    want = rotary.reference(qkv, head_norm, table, positions, cache, 1, slots)
    buffer = torch.full((7, qkv.shape[1] + 8), torch.nan, dtype=dtype, device=DEVICE)
    projected = buffer[:, : qkv.shape[1]].copy_(qkv)
    got = rotary.fused(projected, head_norm, table, positions, other, 1, slots)
    for ours, theirs in zip(got, want, strict=True):
        close(ours, theirs)
        assert ours.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr(), "a copy was made"
    assert buffer[:, qkv.shape[1] :].isnan().all(), "another row was written"
    assert (cache.isnan() == other.isnan()).all(), "another place was written"
    close(other.nan_to_num(), cache.nan_to_num())


@pytest.mark.skipif(not CUDA, reason="Triton's interpreter rounds to float8 wrongly")
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_into_fp8(rng: torch.Generator, dtype: torch.dtype) -> None:
    """Rounded alike, and what is too large becomes the largest number, not NaN."""
    qkv = random(rng, 7, 8 * 32, dtype=dtype, scale=300.0)
    table, positions = random(rng, 50, 32), torch.randint(0, 50, (7,), generator=rng, device=DEVICE)
    slots = torch.randperm(64, generator=rng, device=DEVICE)[:7]
    cache = torch.zeros(4, 1, 2, 2, 16, 32, device=DEVICE).to(torch.float8_e4m3fn)
    other = cache.clone()
    rotary.reference(qkv, None, table, positions, cache, 0, slots)
    rotary.fused(qkv.clone(), None, table, positions, other, 0, slots)
    want, got = cache.float(), other.float()
    assert want.abs().max() == 448
    assert not got.isnan().any()
    # Sums in another order may fall on the other side of a boundary.
    assert (got - want).norm() / want.norm() < 1e-2
    assert (got == want).float().mean() > 0.99


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "hidden", "inner"),
    [(1, 4, 2, 16, 8), (5, 7, 3, 70, 33), (200, 3, 1, 24, 80), (90, 8, 8, 32, 16)],
)
def test_moe(
    rng: torch.Generator, tokens: int, experts: int, top_k: int, hidden: int, inner: int, dtype: torch.dtype
) -> None:
    x, router = random(rng, tokens, hidden, dtype=dtype), random(rng, experts, hidden, dtype=dtype)
    gate_up = random(rng, experts, 2 * inner, hidden, dtype=dtype, scale=0.2)
    down = random(rng, experts, hidden, inner, dtype=dtype, scale=0.2)
    for renormalize in (False, True):
        want = moe.reference(x, router, gate_up, down, top_k, renormalize)
        close(moe.fused(x, router, gate_up, down, top_k, renormalize), want)


def test_moe_with_one_expert_for_all(rng: torch.Generator) -> None:
    x = random(rng, 1, 16).expand(150, 16).contiguous()
    router, gate_up, down = random(rng, 8, 16), random(rng, 8, 24, 16), random(rng, 8, 16, 12)
    close(moe.fused(x, router, gate_up, down, 2, True), moe.reference(x, router, gate_up, down, 2, True))


@pytest.mark.parametrize(("batch", "block_tokens"), [(1, 16), (7, 1), (40, 3)])
@pytest.mark.parametrize("groups", [1, 3])
def test_complete(rng: torch.Generator, batch: int, block_tokens: int, groups: int) -> None:
    """Unknown tokens are filled in, tables grow by the blocks that begin, rows that fill up touch nothing."""
    num_rows, max_blocks = batch + 5, 600
    rows = torch.randperm(num_rows, generator=rng, device=DEVICE)[:batch]
    positions = torch.randint(0, max_blocks * block_tokens, (batch,), generator=rng, device=DEVICE)
    slots = torch.randint(0, 10**12, (groups, batch + 3), generator=rng, device=DEVICE)[:, :batch]
    tokens = torch.randint(0, 1000, (batch,), generator=rng, device=DEVICE)
    tokens[::2] = -1 - rows[::2]
    slots[:, 3::4] = -1
    last = torch.randint(-1, 1000, (num_rows,), generator=rng, device=DEVICE)
    tables = torch.randint(-1, 10**9, (groups, num_rows, max_blocks), generator=rng, device=DEVICE)
    results = []
    for complete in (decode_inputs.reference, decode_inputs.fused):
        own = tokens.clone(), tables.clone()
        out = tuple(torch.full(shape, -7, device=DEVICE) for shape in ((groups, batch + 2, max_blocks), (batch + 2,)))
        complete(own[0], positions, slots, rows, last, own[1], *out, block_tokens)
        results.append((*own, *out))
    (tokens_a, tables_a, out_a, lens_a), (tokens_b, tables_b, out_b, lens_b) = results
    assert tokens_a.equal(tokens_b)
    assert (tokens_a >= 0).all()
    assert tables_a.equal(tables_b)
    assert lens_a.equal(lens_b)
    assert (lens_b[batch:] == -7).all()
    for i in range(batch):
        used = -(-int(lens_a[i]) // block_tokens)
        assert out_a[:, i, :used].equal(out_b[:, i, :used])
        assert (out_b[:, i, used:] == -7).all()
