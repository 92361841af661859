"""Attention in Triton against its references: prefixes, chunks, windows, sinks, fp8, poison wherever nobody may read.

On a GPU the kernels run as they are; elsewhere Triton's interpreter runs the same source, in float32 and float16.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tandem.kernels import decode_attention, on_gpu, paged_prefill, prefill_attention
from tandem.kernels.prefill_attention import Run, Span, Spans, plan
from torch.nn.attention import SDPBackend

pytestmark = [
    pytest.mark.skipif(not on_gpu.AVAILABLE, reason="Triton is not installed"),
    # Said of the references, under `poisoned_outputs`.
    pytest.mark.filterwarnings("ignore:.*deterministic"),
]

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
# The interpreter's bfloat16 products are wrong.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
HAS_FP8 = not CUDA or torch.cuda.get_device_capability() >= (8, 9)

# heads, kv_heads, head_dim, block_tokens
SHAPES = [(8, 2, 32, 16), (5, 1, 14, 64), (4, 4, 16, 1), (16, 1, 128, 16), (6, 2, 160, 8)]


@pytest.fixture(autouse=True)
def poisoned_outputs() -> Iterator[None]:
    """Uninitialised memory is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def random(rng: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(shape, generator=rng, device=DEVICE)).to(dtype)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    assert not want.isnan().any()
    error = (got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-6)
    assert error <= TOLERANCE[got.dtype], f"relative error {error:.1e}"


class Paged:
    """Contexts in scattered blocks of layer 1 of a cache, which is zero elsewhere.

    Args:
        sizes: (new tokens, tokens) of each context.
        shape: heads, kv_heads, head_dim, block_tokens.
    """

    def __init__(
        self, rng: torch.Generator, sizes: list[tuple[int, int]], shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        self.sizes = sizes
        _, kv_heads, head_dim, self.block_tokens = shape
        counts = [-(-context // self.block_tokens) for _, context in sizes]
        order = torch.randperm(sum(counts) + 2, generator=rng, device=DEVICE)
        self.tables = list(order[: sum(counts)].split(counts))
        self.cache = torch.zeros(len(order), 3, 2, kv_heads, self.block_tokens, head_dim, device=DEVICE).to(dtype)
        self.written = torch.zeros(len(order), self.block_tokens, dtype=torch.bool, device=DEVICE)
        for (_, context), table in zip(sizes, self.tables, strict=True):
            self.write(table, 0, random(rng, 2, context, kv_heads, head_dim, dtype=dtype))

    def write(self, table: torch.Tensor, first: int, kv: torch.Tensor) -> None:
        """Keys and values [2, tokens, kv_heads, head_dim] from position ``first`` on."""
        for i in range(kv.shape[1]):
            block, offset = table[(first + i) // self.block_tokens], (first + i) % self.block_tokens
            self.cache[block, 1, :, :, offset] = kv[:, i]
            self.written[block, offset] = True

    def poisoned(self, window: int) -> torch.Tensor:
        """The cache with NaN in every place that no new token sees."""
        seen = torch.zeros_like(self.written)
        for (new, context), table in zip(self.sizes, self.tables, strict=True):
            for at in range(max(0, context - new - window + 1) if window else 0, context):
                seen[table[at // self.block_tokens], at % self.block_tokens] = True
        cache = torch.full(self.cache.shape, torch.nan, device=DEVICE).to(self.cache.dtype)
        cache[:, 1] = torch.where(seen[:, None, None, :, None], self.cache[:, 1].float(), torch.nan).to(cache.dtype)
        return cache

    def spans(self, start: int) -> Spans:
        """Of a batch whose first ``start`` rows are others'."""
        spans = []
        for (new, context), table in zip(self.sizes, self.tables, strict=True):
            spans.append(Span(start, start + new, table, context))
            start += new
        return Spans.of(spans)


def projected(rng: torch.Generator, tokens: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """Queries, keys and values as views of one tensor."""
    heads, kv_heads, head_dim, _ = shape
    qkv = random(rng, tokens, heads + 2 * kv_heads, head_dim, dtype=dtype)
    return list(qkv.split([heads, kv_heads, kv_heads], dim=1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("window", "sink"), [(0, False), (0, True), (1, True), (17, False)])
def test_decode_attention(
    rng: torch.Generator, shape: tuple[int, ...], window: int, sink: bool, dtype: torch.dtype
) -> None:
    heads, _, head_dim, block_tokens = shape
    paged = Paged(rng, [(1, n) for n in (1, 2, block_tokens, block_tokens + 1, 77, 330)], shape, dtype)
    lengths = torch.tensor([context for _, context in paged.sizes], device=DEVICE)
    tables = torch.full((6, -(-330 // block_tokens)), len(paged.cache) - 1, device=DEVICE)
    for row, table in zip(tables, paged.tables, strict=True):
        row[: len(table)] = table
    q, _, _ = projected(rng, 6, shape, dtype)
    sinks = random(rng, heads, dtype=dtype, scale=3.0) if sink else None
    where = tables, lengths, head_dim**-0.5, window, sinks
    want = decode_attention.reference(q, paged.cache, 1, *where)
    close(decode_attention.fused(q, paged.poisoned(window), 1, *where), want)
    # An empty context, as in a batch that is filled up, gives zeros, with sinks too.
    none = decode_attention.fused(q, paged.poisoned(window), 1, tables, torch.zeros_like(lengths), *where[2:])
    assert (none == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("window", "sink"), [(0, False), (0, True), (300, True), (100, False)])
def test_one_context_is_split(rng: torch.Generator, window: int, sink: bool, dtype: torch.dtype) -> None:
    """Several programs share a context, and the sinks count once; what lies before the window is nobody's."""
    shape = (5, 1, 14, 64)
    paged = Paged(rng, [(1, 700)], shape, dtype)
    q, _, _ = projected(rng, 1, shape, dtype)
    sinks = random(rng, 5, dtype=dtype, scale=3.0) if sink else None
    where = paged.tables[0].unsqueeze(0), torch.tensor([700], device=DEVICE), 0.3, window, sinks
    want = decode_attention.reference(q, paged.cache, 1, *where)
    close(decode_attention.fused(q, paged.poisoned(window), 1, *where), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("window", "sink"), [(0, False), (1000, True), (1, True), (17, False), (100, True)])
def test_prefill_attention(
    rng: torch.Generator, shape: tuple[int, ...], window: int, sink: bool, dtype: torch.dtype
) -> None:
    check_prompts(rng, [(5, 5), (1, 1), (33, 170), (2, 130)], shape, dtype, window, sink)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES if CUDA else SHAPES[:1], ids=str)
@pytest.mark.parametrize(
    ("window", "sink", "splits"), [(0, True, 2), (17, True, 5), (100, False, 3)] if CUDA else [(17, True, 5)]
)
def test_contexts_of_few_queries_are_split(
    rng: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, ...],
    window: int,
    sink: bool,
    splits: int,
    dtype: torch.dtype,
) -> None:
    """More parts than some contexts have tiles, and rows that see nothing of most parts."""
    monkeypatch.setattr(paged_prefill, "num_splits", lambda *_: splits)
    check_prompts(rng, [(5, 5), (33, 290) if CUDA else (17, 150), (2, 130)], shape, dtype, window, sink)


def check_prompts(
    rng: torch.Generator,
    prompts: list[tuple[int, int]],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    window: int,
    sink: bool,
) -> None:
    """So many new tokens each, of so many in all: too short for the library, so fresh keys are not read."""
    heads, _, head_dim, _ = shape
    paged = Paged(rng, prompts, shape, dtype)
    q, k, _ = projected(rng, 3 + sum(new for new, _ in prompts), shape, dtype)
    sinks = random(rng, heads, dtype=dtype, scale=3.0) if sink else None
    how = 1, paged.spans(3), head_dim**-0.5, window, sinks
    want = prefill_attention.reference(q, None, None, paged.cache, *how)
    nothing = torch.full_like(k, torch.nan)
    got = prefill_attention.fused(q, nothing, nothing, paged.poisoned(window), *how)
    close(got[3:], want[3:])


def test_a_gpu_has_work_for_all_its_processors() -> None:
    assert paged_prefill.num_splits(8, 32768, 132) == 16
    assert paged_prefill.num_splits(1, 1 << 20, 132) == 32
    assert paged_prefill.num_splits(8, 1024, 132) == 2
    assert paged_prefill.num_splits(8, 300, 132) == 1
    assert paged_prefill.num_splits(200, 32768, 132) == 1


@pytest.mark.parametrize("dtype", [torch.float16, *([torch.bfloat16] if CUDA else [])])
@pytest.mark.parametrize("shape", [(4, 2, 16, 16), (3, 1, 64, 8), (2, 2, 8, 32)], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [[(128, 128)], [(128, 128), (128, 128), (256, 256)], [(300, 300), (64, 64), (128, 128), (140, 200), (128, 128)]],
    ids=str,
)
def test_the_library_and_the_kernel_agree(
    rng: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, ...],
    sizes: list[tuple[int, int]],
    dtype: torch.dtype,
) -> None:
    monkeypatch.setattr(prefill_attention, "DIRECT_LEAST", 128)
    head_dim = shape[2]
    paged = Paged(rng, sizes, shape, dtype)
    first = 8 if len(sizes) > 1 else 0
    spans = paged.spans(first)
    q, k, v = projected(rng, spans.each[-1].stop, shape, dtype)
    for start, stop, table, context in spans.each:
        paged.write(table, context - (stop - start), torch.stack((k[start:stop], v[start:stop])))
    want = prefill_attention.reference(q, None, None, paged.cache, 1, spans, head_dim**-0.5, 0)
    got = prefill_attention.fused(q, k, v, paged.poisoned(0), 1, spans, head_dim**-0.5, 0)
    close(got[first:], want[first:])
    # With a sink that weighs nothing all rows go to the kernel.
    sinks = torch.full((shape[0],), -1e4, dtype=dtype, device=DEVICE)
    other = prefill_attention.fused(q, k, v, paged.poisoned(0), 1, spans, head_dim**-0.5, 0, sinks)
    close(other[first:], want[first:])


def test_whole_contexts_do_not_touch_the_cache(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_attention, "DIRECT_LEAST", 128)
    shape, dtype = (4, 2, 16, 16), torch.float16
    paged = Paged(rng, [(128, 128), (128, 128), (256, 256)], shape, dtype)
    q, k, v = projected(rng, 512, shape, dtype)
    for start, stop, table, _ in paged.spans(0).each:
        paged.write(table, 0, torch.stack((k[start:stop], v[start:stop])))
    want = prefill_attention.reference(q, None, None, paged.cache, 1, paged.spans(0), 0.25, 256)
    poison = torch.full_like(paged.cache, torch.nan)
    close(prefill_attention.fused(q, k, v, poison, 1, paged.spans(0), 0.25, 256), want)


def test_keys_that_are_not_aligned_stay_with_the_kernel(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_attention, "DIRECT_LEAST", 128)
    shape, dtype = (2, 2, 8, 16), torch.float16
    paged = Paged(rng, [(128, 128)], shape, dtype)
    q = random(rng, 128, 2 * 8 + 1, dtype=dtype)[:, 1:].unflatten(1, (2, 8))
    want = prefill_attention.reference(q, None, None, paged.cache, 1, paged.spans(0), 0.3, 0)
    nothing = torch.full_like(q, torch.nan)
    close(prefill_attention.fused(q, nothing, nothing, paged.poisoned(0), 1, paged.spans(0), 0.3, 0), want)


@pytest.mark.skipif(not HAS_FP8, reason="this GPU has no float8")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 17])
def test_fp8_kv(rng: torch.Generator, window: int, dtype: torch.dtype) -> None:
    shape = (8, 2, 32, 16)
    paged = Paged(rng, [(128, 128), (20, 90)], shape, torch.float8_e4m3fn)
    q, k, v = projected(rng, 148, shape, dtype)
    want = prefill_attention.reference(q, None, None, paged.cache, 1, paged.spans(0), 0.2, window)
    close(prefill_attention.fused(q, k, v, paged.poisoned(window), 1, paged.spans(0), 0.2, window), want)
    lengths = torch.tensor([128, 90], device=DEVICE)
    tables = torch.stack((paged.tables[0], torch.nn.functional.pad(paged.tables[1], (0, 2))))
    where = tables, lengths, 0.2, window
    want = decode_attention.reference(q[:2], paged.cache, 1, *where)
    close(decode_attention.fused(q[:2], paged.cache, 1, *where), want)


def test_the_plan() -> None:
    table = torch.zeros(0, dtype=torch.int64)

    def spans(*sizes: tuple[int, int]) -> list[Span]:
        ends = [sum(new for new, _ in sizes[:i]) for i in range(len(sizes) + 1)]
        return [Span(10 + ends[i], 10 + ends[i + 1], table, context) for i, (_, context) in enumerate(sizes)]

    # Equal neighbours are one call; a remainder, a chunk and a short prompt are not the library's.
    several = spans((8, 8), (8, 8), (4, 4), (9, 9), (8, 12), (3, 3), (8, 8))
    runs, taken = plan(several, 0, 4, 4)
    assert runs == [Run(10, 2, 8), Run(26, 1, 4), Run(30, 1, 8), Run(50, 1, 8)]
    assert taken == [8, 8, 4, 8, 0, 0, 8]
    assert plan(several, 0, 4, 8) == ([Run(10, 2, 8), Run(30, 1, 8), Run(50, 1, 8)], [8, 8, 0, 8, 0, 0, 8])
    # Unequal remainders keep neighbours apart.
    assert plan(spans((9, 9), (9, 9)), 0, 4, 4)[0] == [Run(10, 1, 8), Run(19, 1, 8)]
    # A window that covers a context changes nothing.
    assert plan(several, 9, 4, 4) == plan(several, 0, 4, 4)
    assert plan(several, 7, 4, 4)[0] == [Run(26, 1, 4)]
    assert plan(several, 0, 0, 4) == ([], [0] * 7)


def test_more_prompts_than_are_looked_at_at_once(rng: torch.Generator) -> None:
    """A tile finds its prompt among many, also where the library leaves nothing of some."""
    shape, dtype = (2, 1, 8, 8), torch.float16
    sizes = [(1 + 7 * i % 40, 1 + 7 * i % 40 + (i % 3) * 5) for i in range(150)]
    paged = Paged(rng, sizes, shape, dtype)
    q, k, _ = projected(rng, sum(new for new, _ in sizes), shape, dtype)
    nothing = torch.full_like(k, torch.nan)
    want = prefill_attention.reference(q, None, None, paged.cache, 1, paged.spans(0), 0.3, 0)
    close(prefill_attention.fused(q, nothing, nothing, paged.poisoned(0), 1, paged.spans(0), 0.3, 0), want)


@pytest.mark.skipif(
    not CUDA or torch.cuda.get_device_capability()[0] not in (9, 10) or torch.backends.cudnn.version() <= 91500,
    reason="torch prefers cuDNN on Hopper and Blackwell alone, and from cuDNN 9.15.1 on",
)
def test_torch_asks_cudnn_first(rng: torch.Generator) -> None:
    views = [t.unsqueeze(0).transpose(1, 2) for t in projected(rng, 256, (32, 8, 128, 16), torch.bfloat16)]
    chosen = torch._fused_sdp_choice(*views, is_causal=True, enable_gqa=True)
    assert chosen == SDPBackend.CUDNN_ATTENTION.value
