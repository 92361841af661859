"""Every kernel against its torch reference: odd shapes, fresh random inputs, poisoned outputs, one and several
threads."""

from __future__ import annotations

from collections.abc import Iterator

import numba
import numpy as np
import pytest
import torch
import transformers
from tandem.kernels import (
    activation,
    decode_attention,
    decode_layers,
    linear,
    moe,
    prefill_attention,
    rms_norm,
    rotary,
    sampling,
)
from tandem.kernels.compiled import num_threads, set_num_threads
from tandem.kernels.expert_weights import ExpertWeights
from tandem.kernels.exponential import exp_inplace
from tandem.kernels.prefill_attention import Span, Spans
from tandem.kernels.sampling import INVALID, SamplingRows
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts


@pytest.fixture(params=[1, 2], autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    if request.param > numba.config.NUMBA_NUM_THREADS:
        pytest.skip("this machine has one core")
    before = num_threads()
    set_num_threads(request.param)
    yield request.param
    set_num_threads(before)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    scale = b.double().abs().max().clamp(min=1e-3)
    error = ((a.double() - b.double()).abs().max() / scale).item()
    assert error <= tolerance, f"relative error {error:.2e}"


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 16, 17, 33, 130])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (3, 5), (19, 31), (160, 256), (515, 48)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear(rng: torch.Generator, rows: int, outputs: int, inputs: int, bias: bool) -> None:
    x = torch.randn(rows, inputs, generator=rng)
    w = torch.randn(outputs, inputs, generator=rng)
    b = torch.randn(outputs, generator=rng) if bias else None
    exact = torch.nn.functional.linear(x.double(), w.double(), None if b is None else b.double()).float()
    close(linear.native(x, w, b), exact)
    close(linear.wide(x, w, b), exact)


@pytest.mark.parametrize("rows", [1, 3, 4, 16, 130])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (19, 31), (515, 48)])
def test_linear_with_bfloat16_weights(rng: torch.Generator, rows: int, outputs: int, inputs: int) -> None:
    x, w = torch.randn(rows, inputs, generator=rng), torch.randn(outputs, inputs, generator=rng).bfloat16()
    close(linear.native(x, w), linear.native(x, w.float()), 1e-6)


def test_linear_with_large_weights_goes_to_the_library(rng: torch.Generator) -> None:
    w = torch.randn(1, linear.MAX_COMPILED_WEIGHTS + 1, generator=rng)
    x = torch.randn(2, linear.MAX_COMPILED_WEIGHTS + 1, generator=rng)
    close(linear.native(x, w), linear.reference(x, w), 1e-4)


@pytest.mark.parametrize(("tokens", "hidden"), [(1, 1), (3, 7), (16, 256), (65, 130)])
def test_rms_norm(rng: torch.Generator, tokens: int, hidden: int) -> None:
    x, r = torch.randn(tokens, hidden, generator=rng), torch.randn(tokens, hidden, generator=rng)
    w = torch.randn(hidden, generator=rng)
    for residual in (None, r):
        want = rms_norm.reference(x, residual, w, 1e-5)
        got = rms_norm.native(x, None if residual is None else residual.clone(), w, 1e-5)
        close(got[0], want[0])
        close(got[1], want[1])


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_tokens"), [(8, 2, 32, 16), (3, 1, 2, 1), (6, 6, 10, 8)]
)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("tokens", [13, 133])
def test_rotary(
    rng: torch.Generator, heads: int, kv_heads: int, head_dim: int, block_tokens: int, norm: bool, tokens: int
) -> None:
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim, generator=rng)
    head_norm = None
    if norm:
        head_norm = rotary.HeadNorm(torch.randn(head_dim, generator=rng), torch.randn(head_dim, generator=rng), 1e-6)
    table = torch.randn(50, head_dim, generator=rng)
    positions = torch.randint(0, 50, (tokens,), generator=rng)
    cache = torch.full((140, 3, 2, kv_heads, block_tokens, head_dim), torch.nan)
    other = cache.clone()
    slots = torch.randperm(140 * block_tokens, generator=rng)[:tokens]
    want = rotary.reference(qkv, head_norm, table, positions, cache, 1, slots)
    got = rotary.native(qkv, head_norm, table, positions, other, 1, slots)
    close(got[0], want[0])
    assert (cache.isnan() == other.isnan()).all(), "another place was written"
    close(other.nan_to_num(), cache.nan_to_num())


CASES = [(8, 2, 32, 16), (6, 2, 10, 8), (5, 1, 14, 64), (4, 4, 16, 1), (12, 2, 64, 16)]


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "block_tokens"), CASES)
@pytest.mark.parametrize("window", [0, 1, 17])
@pytest.mark.parametrize("sink", [False, True])
def test_decode_attention(
    rng: torch.Generator, heads: int, kv_heads: int, head_dim: int, block_tokens: int, window: int, sink: bool
) -> None:
    lengths = torch.tensor([1, 2, block_tokens, block_tokens + 1, 77, 130])
    most = -(-130 // block_tokens)
    # Blocks that no sequence may read are poison.
    cache = torch.full((6 * most + 1, 2, 2, kv_heads, block_tokens, head_dim), torch.nan)
    tables = torch.full((6, most), 6 * most)
    free = iter(torch.randperm(6 * most, generator=rng).tolist())
    for i, length in enumerate(lengths.tolist()):
        for block in range(-(-length // block_tokens)):
            tables[i, block] = next(free)
            cache[tables[i, block]] = torch.randn(2, 2, kv_heads, block_tokens, head_dim, generator=rng)
    q = torch.randn(6, heads, head_dim, generator=rng)
    sinks = 3 * torch.randn(heads, generator=rng) if sink else None
    want = decode_attention.reference(q, cache, 1, tables, lengths, head_dim**-0.5, window, sinks)
    assert not want.isnan().any()
    close(decode_attention.native(q, cache, 1, tables, lengths, head_dim**-0.5, window, sinks), want)
    for table, length in zip(tables, lengths.tolist(), strict=True):
        table[: max(0, length - window) // block_tokens if window else 0] = 6 * most  # dead
    for attention in (decode_attention.reference, decode_attention.native):
        close(attention(q, cache, 1, tables, lengths, head_dim**-0.5, window, sinks), want)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "block_tokens"), CASES)
@pytest.mark.parametrize(
    "sizes", [[(1, 1)], [(2, 2), (5, 300)], [(33, 33)], [(70, 131), (1, 1), (3, 9)], [(129, 400)]], ids=str
)
@pytest.mark.parametrize("window", [0, 1, 17, 1000])
@pytest.mark.parametrize("sink", [False, True])
def test_prefill_attention(
    rng: torch.Generator, heads: int, kv_heads: int, head_dim: int, block_tokens: int, sizes: list[tuple[int, int]],
    window: int, sink: bool,
) -> None:  # fmt: skip
    blocks = sum(-(-context // block_tokens) for _, context in sizes)
    cache = torch.randn(blocks + 2, 2, 2, kv_heads, block_tokens, head_dim, generator=rng)
    tables = torch.randperm(blocks + 2, generator=rng)[:blocks].split([-(-c // block_tokens) for _, c in sizes])
    # The first rows are another operation's.
    ends = torch.tensor([3, *(tokens for tokens, _ in sizes)]).cumsum(0).tolist()
    spans = [
        Span(start, stop, table, context)
        for start, stop, table, (_, context) in zip(ends, ends[1:], tables, sizes, strict=False)
    ]
    q = torch.randn(ends[-1], heads, head_dim, generator=rng)
    sinks = 3 * torch.randn(heads, generator=rng) if sink else None
    want = prefill_attention.reference(q, None, None, cache, 1, Spans.of(spans), head_dim**-0.5, window, sinks)
    got = prefill_attention.native(q, None, None, cache, 1, Spans.of(spans), head_dim**-0.5, window, sinks)
    close(got[3:], want[3:])
    # Blocks that no row sees are gone: what their entries name is another's.
    unused = next(block for block in range(blocks + 2) if all(block not in table for table in tables))
    cache[unused] = torch.nan
    for table, (tokens, context) in zip(tables, sizes, strict=True):
        table[: max(0, context - tokens - window + 1) // block_tokens if window else 0] = unused
    for attention in (prefill_attention.reference, prefill_attention.native):
        again = attention(q, None, None, cache, 1, Spans.of(spans), head_dim**-0.5, window, sinks)
        close(again[3:], want[3:])


def test_both_attentions_agree(rng: torch.Generator) -> None:
    cache = torch.randn(9, 1, 2, 2, 16, 8, generator=rng)
    table = torch.randperm(9, generator=rng)
    q, sinks = torch.randn(1, 4, 8, generator=rng), torch.randn(4, generator=rng)
    for window in (0, 20):
        one = decode_attention.native(q, cache, 0, table.unsqueeze(0), torch.tensor([140]), 0.3, window, sinks)
        several = prefill_attention.native(
            q, None, None, cache, 0, Spans.of([Span(0, 1, table, 140)]), 0.3, window, sinks
        )
        close(several, one)


def test_fp8_kv_is_the_nearest_number(rng: torch.Generator) -> None:
    """Attention over KV of 8 bits is attention over the same numbers in 32; what is too large is cut off, not NaN."""
    qkv = 200 * torch.randn(20, 8 * 16, generator=rng)
    cache = torch.zeros(3, 1, 2, 2, 8, 16).to(torch.float8_e4m3fn)
    positions, table = torch.arange(20), torch.tensor([2, 0, 1])
    slots = table[positions // 8] * 8 + positions % 8
    q, k, v = rotary.reference(qkv, None, torch.ones(20, 16), positions, cache, 0, slots)
    held = cache[table, 0].float().transpose(0, 1).transpose(1, 2).reshape(2, 2, 24, 16)[:, :, :20].transpose(1, 2)
    for given, kept in zip((k, v), held, strict=True):
        limited = given.clamp(-448, 448)
        assert ((kept - limited).abs() <= limited.abs() / 16 + 2**-10).all()
    assert held.abs().max() == 448
    # With so large keys, a softmax that is not decided by the last bit of a product.
    arguments = 1e-4, 0
    want = prefill_attention.reference(q, k, v, cache.float(), 0, Spans.of([Span(0, 20, table, 20)]), *arguments)
    close(prefill_attention.reference(q, k, v, cache, 0, Spans.of([Span(0, 20, table, 20)]), *arguments), want)
    last = decode_attention.reference(q[-1:], cache, 0, table.unsqueeze(0), torch.tensor([20]), *arguments)
    close(last, want[-1:])


@pytest.mark.parametrize("rows", [1, 3, 200])
@pytest.mark.parametrize("inner", [1, 19, 80, 700])
def test_silu_mul(rng: torch.Generator, rows: int, inner: int) -> None:
    x = torch.randn(rows, 2 * inner, generator=rng) * 20
    close(activation.native(x), activation.reference(x.double()).float())


@pytest.mark.parametrize("tokens", [1, 2, 5, 16, 40, 300])
@pytest.mark.parametrize(
    ("experts", "top_k", "inner", "hidden"), [(16, 2, 80, 256), (5, 3, 19, 48), (4, 4, 7, 12), (3, 1, 1, 5)]
)
@pytest.mark.parametrize("renormalize", [False, True])
def test_moe(
    rng: torch.Generator, tokens: int, experts: int, top_k: int, inner: int, hidden: int, renormalize: bool
) -> None:
    x = torch.randn(tokens, hidden, generator=rng)
    router = torch.randn(experts, hidden, generator=rng)
    gate_up = torch.randn(experts, 2 * inner, hidden, generator=rng) / hidden**0.5
    down = torch.randn(experts, hidden, inner, generator=rng) / inner**0.5
    want = moe.reference(x, router, gate_up, down, top_k, renormalize)
    close(moe.native(x, router, gate_up, down, top_k, renormalize), want, 1e-4)


@pytest.mark.parametrize("tokens", [0, 1, 23])
@pytest.mark.parametrize("large", [False, True])
def test_experts_of_some_pairs(rng: torch.Generator, tokens: int, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs of token and expert that are another rank's count as nothing, be it all of a token's."""
    if large:
        monkeypatch.setattr(moe, "MAX_COMPILED_EXPERT", 0)
    x, weights = torch.randn(tokens, 18, generator=rng), torch.rand(tokens, 3, generator=rng)
    ids = torch.stack([torch.randperm(9, generator=rng)[:3] - 4 for _ in range(tokens)] or [torch.empty(3).long()])
    ids = ids[:tokens].clamp(min=-1)
    own = ExpertWeights(torch.randn(5, 14, 18, generator=rng) / 4, torch.randn(5, 18, 7, generator=rng) / 2)
    want = torch.zeros(tokens, 18, dtype=torch.float64)
    for t, k in (ids >= 0).nonzero().tolist():
        gate, up = (own.gate_up[ids[t, k]].double() @ x[t].double()).chunk(2)
        want[t] += weights[t, k] * (own.down[ids[t, k]].double() @ (torch.nn.functional.silu(gate) * up))
    for got in (moe.reference_experts(x, weights, ids, own), moe.native_experts(x, weights, ids, own)):
        torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-4)


def test_biased_experts_with_a_clamped_unit(rng: torch.Generator) -> None:
    """gpt-oss's, against transformers'."""
    config = transformers.GptOssConfig(
        hidden_size=16, intermediate_size=10, num_local_experts=4, num_experts_per_tok=2, num_hidden_layers=1
    )
    theirs = GptOssExperts(config)
    for parameter in theirs.parameters():
        parameter.data = torch.randn(parameter.shape, generator=rng)
    x, weights = torch.randn(7, 16, generator=rng), torch.rand(7, 2, generator=rng)
    ids = torch.stack([torch.randperm(4, generator=rng)[:2] for _ in range(7)])
    gate_up, bias = theirs.gate_up_proj.data, theirs.gate_up_proj_bias.data
    own = ExpertWeights(
        torch.cat([gate_up[:, :, ::2], gate_up[:, :, 1::2]], -1).transpose(1, 2),
        theirs.down_proj.data.transpose(1, 2),
        torch.cat([bias[:, ::2], bias[:, 1::2]], -1),
        theirs.down_proj_bias.data,
        "clamped_swiglu",
    )
    with torch.no_grad():
        want = theirs(x, ids, weights)
    close(moe.reference_experts(x, weights, ids, own), want, 1e-5)
    assert {name: len(tensor) for name, tensor in own.tensors().items()} == dict.fromkeys(
        ("gate_up", "down", "gate_up_bias", "down_bias"), 4
    )


def test_moe_with_bfloat16_weights(rng: torch.Generator) -> None:
    x, router = torch.randn(17, 32, generator=rng), torch.randn(6, 32, generator=rng).bfloat16()
    gate_up = torch.randn(6, 24, 32, generator=rng).bfloat16()
    down = torch.randn(6, 32, 12, generator=rng).bfloat16()
    want = moe.native(x, router.float(), gate_up.float(), down.float(), 2, True)
    close(moe.native(x, router, gate_up, down, 2, True), want, 1e-6)


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("experts", [0, 5])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_layers(
    rng: torch.Generator, rows: int, experts: int, bias: bool, window: int, dtype: torch.dtype
) -> None:
    hidden, heads, kv_heads, head_dim, inner, block_tokens = 24, 6, 2, 10, 14, 4

    def make(*shape: int) -> torch.Tensor:
        values = 0.3 * torch.randn(*shape, generator=rng)
        return values.to(dtype) if len(shape) > 1 else values

    def layer(group: int, place: int) -> decode_layers.LayerWeights:
        return decode_layers.LayerWeights(
            input_norm=make(hidden),
            qkv=make((heads + 2 * kv_heads) * head_dim, hidden),
            qkv_bias=make((heads + 2 * kv_heads) * head_dim) if bias else None,
            head_norm=None if bias else rotary.HeadNorm(make(head_dim), make(head_dim), 1e-6),
            o=make(hidden, heads * head_dim),
            o_bias=make(hidden) if bias else None,
            post_norm=make(hidden),
            router=make(experts, hidden) if experts else None,
            gate_up=make(experts or 1, 2 * inner, hidden),
            down=make(experts or 1, hidden, inner),
            top_k=2 if experts else 0,
            renormalize=not bias,
            eps=1e-6,
            scale=head_dim**-0.5,
            window=window if group else 0,
            group=group,
            place=place,
        )

    def widened(weights: decode_layers.LayerWeights) -> decode_layers.LayerWeights:
        return decode_layers.LayerWeights(*(w.float() if isinstance(w, torch.Tensor) else w for w in weights))

    weights = [layer(0, 1), layer(1, 0), layer(0, 0)]
    lengths = torch.arange(1, rows + 1) * 3
    where = []
    for tables in torch.randperm(rows * 12, generator=rng).view(2, rows, 6):
        slots = tables.gather(1, (lengths - 1).unsqueeze(1) // block_tokens).squeeze(1) * block_tokens
        where.append(decode_layers.Rows(lengths - 1, slots + (lengths - 1) % block_tokens, tables, lengths))
    cache = torch.randn(rows * 12, 2, 2, kv_heads, block_tokens, head_dim, generator=rng)
    other, x = cache.clone(), torch.randn(rows, hidden, generator=rng)
    table = torch.randn(64, head_dim, generator=rng)
    want = decode_layers.reference(x, [widened(w) for w in weights], where, cache, table)
    seen: list[int] = []
    prepared = [decode_layers.Prepared(w) for w in weights]
    got = decode_layers.native(x.clone(), prepared, where, other, table, seen.append)
    close(got[0], want[0], 1e-4)
    close(got[1], want[1], 1e-4)
    close(other, cache, 1e-4)
    assert seen == [0, 1, 2]


def test_moe_with_one_expert_for_all(rng: torch.Generator) -> None:
    x = torch.randn(1, 16, generator=rng).expand(300, 16).contiguous()
    router, gate_up = torch.randn(8, 16, generator=rng), torch.randn(8, 12, 16, generator=rng)
    down = torch.randn(8, 16, 6, generator=rng)
    out = moe.native(x, router, gate_up, down, 2, True)
    close(out, moe.reference(x, router, gate_up, down, 2, True), 1e-4)
    assert (out == out[0]).all()


def test_exponential() -> None:
    x = np.concatenate([np.linspace(-100, 80, 1001), [0.0, -0.0, -1e30, -np.inf, np.nan]]).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    got = x.copy()
    exp_inplace(got, np.empty(len(x), np.int32))
    assert np.isnan(got[-1])
    inside = np.abs(x) < 85
    assert (np.abs(got[inside] / exact[inside] - 1) < 3e-7).all()
    assert (got[x < -87] < 1e-37).all()


def rows(count: int, rng: torch.Generator, **fixed: float) -> SamplingRows:
    """Random parameters, with every filter on and off."""

    def some(value: torch.Tensor, off: float) -> torch.Tensor:
        return torch.where(torch.rand(count, generator=rng) < 0.5, value, torch.tensor(off))

    params = SamplingRows(
        temperature=some(torch.rand(count, generator=rng) * 2 + 0.01, 0.0),
        top_k=some(torch.randint(1, 60, (count,), generator=rng), 0).to(torch.int64),
        top_p=some(torch.rand(count, generator=rng) * 0.98 + 0.01, 1.0),
        min_p=some(torch.rand(count, generator=rng) * 0.3, 0.0),
        seed=torch.randint(0, 2**62, (count,), generator=rng),
        position=torch.randint(0, 10_000, (count,), generator=rng),
    )
    fields = {name: torch.full_like(getattr(params, name), value) for name, value in fixed.items()}
    return params._replace(**fields)


def test_sampling_equals_its_reference(rng: torch.Generator) -> None:
    for vocabulary in (2, 131, 4096):
        logits = torch.randn(200, vocabulary, generator=rng) * 5
        params = rows(200, rng)
        want, got = sampling.reference(logits, params), sampling.native(logits, params)
        # Where a filter's sum lands within rounding of its bound, the two may differ, and only there.
        nudged = torch.zeros(200, dtype=torch.bool)
        for change in (-1e-5, 1e-5):
            for field in ("top_p", "min_p"):
                value = getattr(params, field)
                other = params._replace(**{field: torch.where(value < 1, value * (1 + change), value)})
                nudged |= sampling.reference(logits, other) == got
        assert ((want == got) | nudged).all()
        assert (want != got).sum() <= 1


def test_sampling_follows_the_distribution(rng: torch.Generator) -> None:
    logits = torch.randn(1, 50, generator=rng) * 1.5
    count = 40_000
    params = rows(count, rng, temperature=0.8, top_k=0, top_p=1.0, min_p=0.0)
    params = params._replace(position=torch.arange(count), seed=torch.full((count,), 12345))
    drawn = torch.bincount(sampling.native(logits.expand(count, 50).contiguous(), params), minlength=50)
    expected = (logits[0] / 0.8).softmax(-1) * count
    keep = expected > 5
    chi2 = ((drawn[keep] - expected[keep]) ** 2 / expected[keep]).sum().item()
    # Mean keep, variance 2 keep: six standard deviations.
    assert chi2 < keep.sum().item() + 6 * (2 * keep.sum().item()) ** 0.5


def test_a_draw_depends_on_seed_and_position_alone(rng: torch.Generator) -> None:
    logits = torch.randn(30, 500, generator=rng)
    params = rows(30, rng, temperature=1.0)
    together = sampling.native(logits, params)
    for i in torch.randperm(30, generator=rng).tolist():
        alone = sampling.native(logits[i : i + 1].clone(), SamplingRows(*(field[i : i + 1] for field in params)))
        assert alone.item() == together[i].item()
    assert (sampling.native(logits, params._replace(seed=params.seed + 1)) != together).any()
    assert (sampling.native(logits, params._replace(position=params.position + 1)) != together).any()


def test_a_draw_is_as_robust_as_the_greedy_choice(rng: torch.Generator) -> None:
    """Logits that differ in the last bits, as other batch shapes make them, must not change the text."""
    logits = torch.randn(2000, 500, generator=rng) * 3
    params = rows(2000, rng, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
    noise = torch.randn(2000, 500, generator=rng) * 1e-6
    changed = (sampling.native(logits, params) != sampling.native(logits + noise, params)).sum()
    assert changed <= 1


def test_filters_keep_what_they_should(rng: torch.Generator) -> None:
    logits = torch.randn(1, 200, generator=rng) * 3
    count = 3000
    wide = logits.expand(count, 200).contiguous()
    base = rows(count, rng, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)._replace(position=torch.arange(count))
    order = logits[0].argsort(descending=True)
    shares = logits[0].softmax(-1)
    top_k = sampling.native(wide, base._replace(top_k=torch.full((count,), 5)))
    assert set(top_k.tolist()) == set(order[:5].tolist())
    cumulative = shares[order].cumsum(-1)
    nucleus = order[: int((cumulative < 0.7).sum()) + 1]
    top_p = sampling.native(wide, base._replace(top_p=torch.full((count,), 0.7)))
    assert set(top_p.tolist()) == set(nucleus.tolist())
    min_p = sampling.native(wide, base._replace(min_p=torch.full((count,), 0.2)))
    assert set(min_p.tolist()) <= set((shares >= 0.2 * shares.max()).nonzero().flatten().tolist())
    for extreme in (
        base._replace(top_k=torch.ones(count, dtype=torch.int64)),
        base._replace(top_p=torch.full((count,), 1e-6)),
    ):
        assert (sampling.native(wide, extreme) == order[0]).all()


@pytest.mark.parametrize("sample", [sampling.reference, sampling.native])
def test_rows_without_an_answer(sample: object, rng: torch.Generator) -> None:
    logits = torch.randn(5, 20, generator=rng)
    logits[1, 7] = torch.nan
    logits[3] = -torch.inf
    logits[4] = -torch.inf
    logits[4, 11] = 1.0
    for temperature in (0.0, 1.0):
        got = sample(logits.clone(), rows(5, rng, temperature=temperature))  # type: ignore[operator]
        assert (got == INVALID).tolist() == [False, True, False, True, False]
        assert got[4] == 11


@pytest.mark.parametrize("sample", [sampling.reference, sampling.native])
def test_infinite_logits_share_the_draw(sample: object, rng: torch.Generator) -> None:
    logits = torch.randn(200, 20, generator=rng)
    logits[:, [3, 8]] = torch.inf
    params = rows(200, rng, temperature=1.0, top_k=0, min_p=0.0)._replace(top_p=torch.tensor([0.9, 1.0]).repeat(100))
    assert set(sample(logits, params).tolist()) == {3, 8}  # type: ignore[operator]
    assert (sample(logits, params._replace(temperature=torch.zeros(200))) == 3).all()  # type: ignore[operator]


def test_penalties() -> None:
    row = torch.tensor([1.0, -1.0, 2.0, 0.5, 3.0])
    sampling.apply_penalties(row, torch.tensor([0, 1]), torch.tensor([2, 2, 4]), 0.1, 0.2, 2.0)
    torch.testing.assert_close(row, torch.tensor([0.5, -2.0, 1.0 - 0.5, 0.5, 1.5 - 0.3]))


def test_logprobs(rng: torch.Generator) -> None:
    logits = torch.randn(3, 40, generator=rng)
    tokens = torch.tensor([3, 5, 7])
    chosen, ids, values = sampling.top_logprobs(logits, tokens, 4)
    exact = logits.log_softmax(-1)
    close(chosen, exact[torch.arange(3), tokens])
    close(values, exact.sort(descending=True).values[:, :4])
    assert (ids[:, 0] == logits.argmax(-1)).all()
