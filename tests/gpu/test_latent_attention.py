"""Latent attention: its references against expanded keys and values in float64, and its Triton kernels against these.

On a GPU the kernels run as they are; elsewhere Triton's interpreter runs the same source, in float32 and float16.
"""

from __future__ import annotations

import pytest
import torch
from tandem.kernels import latent_attention, latent_prefill, on_gpu
from tandem.kernels.latent_attention import LatentNorm
from tandem.kernels.prefill_attention import Span, Spans

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
# The interpreter's bfloat16 products are wrong.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
NUM_BLOCKS = 24
LAYER = 1

needs_triton = pytest.mark.skipif(not on_gpu.AVAILABLE, reason="Triton is not installed")


def random(rng: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=rng, device=DEVICE).to(dtype)


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    assert got.shape == want.shape
    error = (got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-6)
    assert error <= tolerance, f"relative error {error:.1e}"


class Paged:
    """Sequences of some lengths in blocks of a cache, NaN wherever none of them is."""

    def __init__(self, rng: torch.Generator, lengths: list[int], width: int, block_tokens: int, dtype: torch.dtype):
        order = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(len(lengths))).tolist()
        self.cache = torch.full((NUM_BLOCKS, 3, 1, 1, block_tokens, width), torch.nan, device=DEVICE).to(dtype)
        self.rows = [random(rng, length, width).to(dtype) for length in lengths]
        longest = max(-(-length // block_tokens) for length in lengths) + 1
        self.tables = torch.full((len(lengths), longest), order[-1], dtype=torch.int64, device=DEVICE)
        for table, rows in zip(self.tables, self.rows, strict=True):
            for first in range(0, len(rows), block_tokens):
                table[first // block_tokens] = block = order.pop(0)
                part = rows[first : first + block_tokens]
                self.cache[block, LAYER, 0, 0, : len(part)] = part
        self.lengths = torch.tensor(lengths, device=DEVICE)


def exact(q: torch.Tensor, rows: torch.Tensor, scale: float, rank: int) -> torch.Tensor:
    """What tokens [tokens, heads, width], the last ones of ``rows``, see of latents, in float64."""
    wide, heads = rows.double(), q.shape[1]
    out = torch.empty(len(q), heads, rank, dtype=torch.float64, device=q.device)
    for token in range(len(q)):
        seen = wide[: len(rows) - len(q) + token + 1]
        out[token] = torch.softmax(q[token].double() @ seen.T * scale, dim=-1) @ seen[:, :rank]
    return out


@pytest.mark.parametrize("name", ["reference", pytest.param("fused", marks=needs_triton)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "rank", "rope", "block_tokens"), [(5, 20, 6, 4), (16, 32, 16, 16), (18, 24, 8, 32)])
def test_decode(
    name: str, dtype: torch.dtype, heads: int, rank: int, rope: int, block_tokens: int, rng: torch.Generator
) -> None:
    lengths = [1, 3, 2 * block_tokens, 71 if block_tokens > 4 else 33]
    paged = Paged(rng, lengths, rank + rope, block_tokens, dtype)
    q = random(rng, len(lengths), heads, rank + rope, dtype=dtype)
    decode = getattr(latent_attention, f"{name}_decode")
    got = decode(q, paged.cache, LAYER, paged.tables, paged.lengths, 0.2, rank)
    assert got.dtype == dtype
    want = torch.cat([exact(q[i : i + 1], rows, 0.2, rank) for i, rows in enumerate(paged.rows)])
    close(got, want, TOLERANCE[dtype])


@needs_triton
def test_split_contexts_and_empty_ones(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of long contexts are put together; a part beyond a short one, or of an empty one, adds nothing."""
    monkeypatch.setattr(latent_attention, "num_processors", lambda device: 20)
    paged = Paged(rng, [250, 7], 26, 16, torch.float32)
    q = random(rng, 3, 4, 26)
    tables = torch.cat((paged.tables, paged.tables[:1]))
    lengths = torch.tensor([250, 7, 0], device=DEVICE)
    got = latent_attention.fused_decode(q, paged.cache, LAYER, tables, lengths, 0.2, 20)
    want = torch.cat([exact(q[i : i + 1], rows, 0.2, 20) for i, rows in enumerate(paged.rows)])
    close(got[:2], want, 2e-5)
    assert not got[2].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("limit", [1 << 25, 300], ids=["at once", "in tiles"])
def test_prefill(limit: int, dtype: torch.dtype, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk after a context, and a whole prompt, beside rows that are others'."""
    monkeypatch.setattr(latent_attention, "_MAX_ELEMENTS", limit)
    paged = Paged(rng, [37, 9], 26, 8, dtype)
    q = random(rng, 2 + 12 + 9, 5, 26, dtype=dtype)
    spans = Spans.of([Span(2, 14, paged.tables[0, :5], 37), Span(14, 23, paged.tables[1, :2], 9)])
    got = latent_attention.reference_prefill(q, paged.cache, LAYER, spans, 0.2, 20)
    close(got[2:14], exact(q[2:14], paged.rows[0], 0.2, 20), TOLERANCE[dtype])
    close(got[14:], exact(q[14:], paged.rows[1], 0.2, 20), TOLERANCE[dtype])


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "rank", "rope", "block_tokens"), [(5, 20, 6, 8), (16, 32, 16, 16), (33, 24, 8, 32)])
def test_prefill_by_tiles(
    dtype: torch.dtype, heads: int, rank: int, rope: int, block_tokens: int, rng: torch.Generator
) -> None:
    """A chunk after a context and whole prompts, in one launch; tiles of which a token has several, and that have
    several tokens."""
    lengths = [37, 9, *[3] * 6]
    paged = Paged(rng, lengths, rank + rope, block_tokens, dtype)
    width, each, row = rank + rope, [], 2
    for i, (fresh, length) in enumerate(zip([12, 9, *[2] * 6], lengths, strict=True)):
        each.append(Span(row, row + fresh, paged.tables[i, : -(-length // block_tokens)], length))
        row += fresh
    spans = Spans.of(each)
    q = random(rng, row, heads, width, dtype=dtype)
    for tile in (None, latent_prefill.Tile(16, 16, 4, 2), latent_prefill.Tile(64, 32, 8, 1)):
        got = latent_prefill.fused(q, paged.cache, LAYER, spans, 0.2, rank, tile)
        assert got.dtype == dtype
        for span, rows in zip(each, paged.rows, strict=True):
            want = exact(q[span.start : span.stop], rows, 0.2, rank)
            close(got[span.start : span.stop], want, TOLERANCE[dtype])


def test_a_tile_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """An H100 lets a program have 227 KiB, smaller GPUs 99."""
    q = torch.empty(1, 16, 576, dtype=torch.bfloat16)
    for kib, rows in ((227, latent_prefill.TILE.rows), (99, 32)):
        monkeypatch.setattr(latent_prefill, "shared_memory_bytes", lambda device, kib=kib: kib << 10)
        assert latent_prefill.tile_for(q).rows == rows
        assert latent_prefill.tile_for(q.float()).rows == 16


@needs_triton
def test_prefill_of_many_spans(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than the kernel looks at together."""
    monkeypatch.setattr(latent_prefill, "_SPANS_AT_ONCE", 4)
    lengths = [5, 2, 7, 3, 2, 11, 4, 2, 6]
    paged = Paged(rng, lengths, 26, 8, torch.float32)
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    spans = Spans.of(
        [
            Span(start, start + length, table, length)
            for start, length, table in zip(starts, lengths, paged.tables, strict=True)
        ]
    )
    q = random(rng, sum(lengths), 5, 26)
    got = latent_prefill.fused(q, paged.cache, LAYER, spans, 0.2, 20)
    for start, rows in zip(starts, paged.rows, strict=True):
        close(got[start : start + len(rows)], exact(q[start : start + len(rows)], rows, 0.2, 20), 2e-5)
    assert not len(latent_prefill.fused(q[:0], paged.cache, LAYER, spans._replace(each=[]), 0.2, 20))


@needs_triton
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_write(dtype: torch.dtype, fp8: bool, interleaved: bool, rng: torch.Generator) -> None:
    """The same rows in the cache, nothing elsewhere, and the same queries; a token without a slot writes nothing."""
    if fp8 and not (CUDA and torch.cuda.get_device_capability() >= (8, 9)):
        pytest.skip("Triton's interpreter rounds to float8 wrongly" if not CUDA else "no float8 on this GPU")
    tokens, heads, rank, rope = 5, 18, 20, 6
    whole = random(rng, tokens, heads, 10 + rope, dtype=dtype)
    q, rows = whole[..., 10:], 40 * random(rng, tokens, 7 + rank + rope, dtype=dtype)[:, 7:]
    norm = LatentNorm(random(rng, rank, dtype=dtype), 1e-6)
    table, positions = random(rng, 64, rope), torch.tensor([3, 0, 63, 17, 5], device=DEVICE)
    slots = torch.tensor([9, 4, 0, 31, 2], device=DEVICE)
    kind = torch.float8_e4m3fn if fp8 else dtype
    caches = [torch.full((8, 3, 1, 1, 4, rank + rope), 7.0, device=DEVICE).to(kind) for _ in range(2)]
    write = latent_attention.reference_write
    want = write(q, rows, norm, interleaved, table, positions, caches[0], LAYER, slots)
    got = latent_attention.fused_write(q, rows, norm, interleaved, table, positions, caches[1], LAYER, slots)
    close(got, want, TOLERANCE[dtype])
    close(caches[1].float(), caches[0].float(), 2e-2 if fp8 else TOLERANCE[dtype])
    slots[:] = -1
    before = caches[1].float().clone()
    latent_attention.fused_write(q, 2 * rows, norm, interleaved, table, positions, caches[1], LAYER, slots)
    assert torch.equal(caches[1].float(), before)
