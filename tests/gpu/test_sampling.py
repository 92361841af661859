"""Sampling on a GPU: the same tokens as the reference, filter by filter, and the same whatever else is in the batch.

On a GPU the kernels run as they are; elsewhere Triton's interpreter runs the same source, in float32 and float16.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tandem.core.randomness import GAMMA, MIX1, MIX2, WORD, mix64, stream_key
from tandem.kernels import candidates, on_gpu, penalties, sampling
from tandem.kernels.sampling import INVALID, SamplingRows

pytestmark = [
    pytest.mark.skipif(not on_gpu.AVAILABLE, reason="Triton is not installed"),
    # NumPy, under the interpreter, warns of infinities that a GPU computes with in silence.
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
ROWS = 200 if CUDA else 12
MARGIN = 1e-4


def random_logits(
    rng: torch.Generator, rows: int, vocabulary: int, dtype: torch.dtype, step: float = 0.0
) -> torch.Tensor:
    """Rows with a gap between them; multiples of ``step``, for ties."""
    logits = 4 * torch.randn(rows, vocabulary + 5, generator=rng, device=DEVICE)
    if step:
        logits = (logits / step).round() * step
    return logits.to(dtype)[:, :vocabulary]


def random_rows(rng: torch.Generator, rows: int, **fixed: float) -> SamplingRows:
    """Parameters as columns of two packed buffers; half of the filters, and some temperatures, are off."""
    uniform = torch.rand(rows, 4, generator=rng, device=DEVICE)
    on = torch.rand(rows, 4, generator=rng, device=DEVICE) < torch.tensor([0.8, 0.5, 0.5, 0.5], device=DEVICE)
    floats = torch.empty(rows, 3, device=DEVICE)
    floats[:, 0] = torch.where(on[:, 0], uniform[:, 0] * 2 + 0.05, 0.0)
    floats[:, 1] = torch.where(on[:, 1], uniform[:, 1] * 0.98 + 0.01, 1.0)
    floats[:, 2] = torch.where(on[:, 2], uniform[:, 2] * 0.3, 0.0)
    integers = torch.empty(rows, 3, dtype=torch.int64, device=DEVICE)
    integers[:, 0] = torch.where(on[:, 3], (uniform[:, 3] * 60 + 1).long(), 0)
    integers[:, 1] = torch.randint(0, 2**62, (rows,), generator=rng, device=DEVICE)
    integers[:, 2] = torch.randint(0, 2**20, (rows,), generator=rng, device=DEVICE)
    params = SamplingRows(
        temperature=floats[:, 0], top_k=integers[:, 0], top_p=floats[:, 1], min_p=floats[:, 2],
        seed=integers[:, 1], position=integers[:, 2],
    )  # fmt: skip
    for name, value in fixed.items():
        getattr(params, name).fill_(value)
    return params


def some(params: SamplingRows, index: slice) -> SamplingRows:
    return SamplingRows(*(field[index] for field in params))


def gumbel(seed: int, position: int, vocabulary: int) -> np.ndarray:
    stream = stream_key(seed, position)
    words = [mix64((stream + (i + 1) * GAMMA) % WORD) for i in range(vocabulary)]
    return -np.log(-np.log((np.array([word >> 11 for word in words], np.float64) + 0.5) * 2.0**-53))


def narrow(logits: torch.Tensor, params: SamplingRows) -> list[bool]:
    """Whether each row's choice hangs by float32's last bits: its winner leads by less than `MARGIN`, or another sum of
    the nucleus, or another least share, rounded differently, would make it another."""
    kept = keep(logits, *candidates.reference(logits, *filters(params)))
    keys = candidates.scale(logits, params.temperature).masked_fill(~kept, -math.inf).cpu().numpy()
    seeds, positions = params.seed.tolist(), params.position.tolist()
    result = []
    for i, temperature in enumerate(params.temperature.tolist()):
        noisy = np.sort(keys[i] + gumbel(seeds[i], positions[i], keys.shape[1])) if temperature > 0 else [-1, 0]
        result.append(len(noisy) > 1 and noisy[-1] - noisy[-2] < MARGIN)
    usual = sampling.reference(logits, params)
    for change in (-1e-5, 1e-5):
        for field in ("top_p", "min_p"):
            value = getattr(params, field)
            nudged = torch.where(value < 1, value * (1 + change), value)
            other = sampling.reference(logits, params._replace(**{field: nudged})) != usual
            result = [a or b for a, b in zip(result, other.tolist(), strict=True)]
    return result


def filters(params: SamplingRows) -> tuple[torch.Tensor, ...]:
    return params.temperature, params.top_k, params.top_p, params.min_p


def keep(logits: torch.Tensor, value: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    least, ids = value.unsqueeze(1), torch.arange(logits.shape[1], device=logits.device)
    return (logits > least) | ((logits == least) & (ids <= last.unsqueeze(1)))


def equal(logits: torch.Tensor, params: SamplingRows) -> torch.Tensor:
    """`sampling.fused`, after comparing it with the reference."""
    before = logits.clone()
    got, want = sampling.fused(logits, params), sampling.reference(logits, params)
    assert got.shape == want.shape
    assert got.dtype == torch.int64
    assert torch.equal(logits.nan_to_num(7), before.nan_to_num(7)), "the logits were changed"
    different = (got != want).nonzero().flatten().tolist()
    if different:
        excused = narrow(logits, params)
        assert all(excused[i] for i in different), (got, want)
        assert len(different) <= 1 + len(got) // 100
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 7, 131, 1000, 5000])
@pytest.mark.parametrize("step", [0.0, 0.5])
def test_equals_the_reference(rng: torch.Generator, vocabulary: int, step: float, dtype: torch.dtype) -> None:
    logits = random_logits(rng, ROWS, vocabulary, dtype, step)
    equal(logits, random_rows(rng, ROWS))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "fixed",
    [
        {"top_k": 1},
        {"top_k": 17},
        {"top_k": 131},
        {"top_k": 2**31 - 1},
        {"top_p": 1e-6},
        {"top_p": 0.9},
        {"top_p": 1 - 2**-24},
        {"min_p": 1.0},
        {"min_p": 0.02},
        {"top_k": 9, "top_p": 0.7, "min_p": 0.01},
        {"top_k": 40, "top_p": 0.99, "min_p": 1e-30},
    ],
)
def test_filters(rng: torch.Generator, fixed: dict[str, float], dtype: torch.dtype) -> None:
    off = {"temperature": 0.7, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    params = random_rows(rng, ROWS // 2, **(off | fixed))
    for step in (0.0, 1.0):
        logits = random_logits(rng, ROWS // 2, 131, dtype, step)
        got = equal(logits, params)
        if fixed.get("top_k") == 1 or fixed.get("top_p") == 1e-6:
            assert torch.equal(got, logits.argmax(-1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [2, 4096, 4100])
def test_candidates(rng: torch.Generator, vocabulary: int, dtype: torch.dtype) -> None:
    params = random_rows(rng, ROWS, temperature=1.3)
    for step in (0.0, 2.0):
        logits = random_logits(rng, ROWS, vocabulary, dtype, step)
        got = keep(logits, *candidates.fused(logits, *filters(params)))
        want = keep(logits, *candidates.reference(logits, *filters(params)))
        # A sum of the nucleus may land within rounding of its bound; then one entry more or less is in it.
        assert (got != want).sum() <= 1 + ROWS // 100


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_equal(rng: torch.Generator, dtype: torch.dtype) -> None:
    logits = torch.full((ROWS, 3000), -3.5, dtype=dtype, device=DEVICE)
    params = random_rows(rng, ROWS, temperature=1.0, min_p=1.0, top_p=1.0)
    params.top_k[ROWS // 2 :] = 2500
    params.top_k[: ROWS // 2] = 20
    assert (equal(logits, params)[: ROWS // 2] < 20).all()
    # A third of the mass is a third of the ids; off by one where a sum of equal shares meets the bound.
    params.top_p.fill_(1 / 3)
    params.top_k.fill_(0)
    value, last = candidates.fused(logits, *filters(params))
    assert (value == -3.5).all()
    assert ((last - 999).abs() <= 1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_of_both_signs_are_equal(rng: torch.Generator, dtype: torch.dtype) -> None:
    logits = torch.zeros(ROWS, 50, dtype=dtype, device=DEVICE)
    logits[:, ::2] = -0.0
    logits[:, 20:] = -1
    equal(logits, random_rows(rng, ROWS, temperature=1.0, top_k=3, top_p=1.0, min_p=0.0))
    assert (equal(logits, random_rows(rng, ROWS, temperature=0.0)) == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_numbers_that_are_none(rng: torch.Generator, temperature: float, dtype: torch.dtype) -> None:
    for vocabulary in (20, 2100):
        logits = random_logits(rng, 8, vocabulary, dtype).clone()
        logits[0, vocabulary - 1] = torch.nan
        logits[1] = -torch.inf
        logits[2] = -torch.inf
        logits[2, vocabulary - 2] = torch.finfo(dtype).min
        logits[3, [5, vocabulary - 3]] = torch.inf
        logits[4] = torch.nan
        logits[5, ::2] = -torch.inf
        logits[6, 0] = torch.finfo(dtype).max
        logits[7] = torch.finfo(dtype).min
        for fixed in ({}, {"top_k": 0, "top_p": 1.0, "min_p": 0.0}, {"top_k": 3, "top_p": 0.8, "min_p": 0.1}):
            got = equal(logits, random_rows(rng, 8, **{"temperature": temperature, **fixed})).tolist()
            assert [i for i in range(8) if got[i] == INVALID] == [0, 1, 4]
            assert got[2] == vocabulary - 2
            assert got[3] in (5, vocabulary - 3)
            assert got[5] % 2
            assert got[6] == 0


def test_extreme_temperatures(rng: torch.Generator) -> None:
    logits = random_logits(rng, ROWS, 300, torch.float32)
    for temperature in (1e-30, 1e-3, 100.0):
        got = equal(logits, random_rows(rng, ROWS, temperature=temperature))
        if temperature < 1e-4:
            assert torch.equal(got, logits.argmax(-1))


def unmixed(z: int) -> int:
    """The inverse of `mix64`."""
    z ^= (z >> 31) ^ (z >> 62)
    z = z * pow(MIX2, -1, WORD) % WORD
    z ^= (z >> 27) ^ (z >> 54)
    z = z * pow(MIX1, -1, WORD) % WORD
    return z ^ (z >> 30) ^ (z >> 60)


def seed_for(word: int, position: int, entry: int) -> int:
    """The seed with which the generator gives ``word`` for an entry; negative if none is."""
    stream = (unmixed(word) - (entry + 1) * GAMMA) % WORD
    seed = unmixed((unmixed(stream) - (position + 1) * GAMMA) % WORD)
    return seed if seed < WORD >> 1 else -1


@pytest.mark.parametrize(
    "value",
    [0, 1, 2**30 + 12345, 2**52 - 1, 2**52, 2**52 + 2**51, 2**53 - 2**40, 2**53 - 2**25 - 7, 2**53 - 1000, 2**53 - 1],
)
def test_noise_at_both_ends(value: int) -> None:
    """An entry with chosen noise wins or loses against another by a small margin, as exact arithmetic has it."""
    seeds = [seed_for((value << 11) + low, 77, 1) for low in range(64)]
    seed = next(seed for seed in seeds if seed >= 0)
    # In float64 the generator's uniform number would round to 1 at the upper end.
    upper = value >= 2**52
    exact = -math.log1p(-(2 * (2**53 - value) - 1) / 2**54) if upper else -math.log((2 * value + 1) / 2**54)
    other = gumbel(seed, 77, 1)[0]
    lead = other + math.log(exact)  # which entry 1 needs to draw level
    margin = 2e-5
    logits = torch.tensor([[0.0, lead + margin], [0.0, lead - margin]], dtype=torch.float32, device=DEVICE)
    one = torch.ones(2, dtype=torch.int64, device=DEVICE)
    params = SamplingRows(one.float(), one * 0, one.float(), one.float() * 0, one * seed, one * 77)
    assert sampling.fused(logits, params).tolist() == [1, 0]


def test_follows_the_distribution(rng: torch.Generator) -> None:
    count = 40_000 if CUDA else 600
    logits = 1.5 * torch.randn(1, 8, generator=rng, device=DEVICE)
    params = random_rows(rng, count, temperature=0.8, top_k=0, top_p=1.0, min_p=0.0, seed=12345)
    params.position.copy_(torch.arange(count, device=DEVICE))
    drawn = torch.bincount(sampling.fused(logits.expand(count, 8), params), minlength=8)
    expected = (logits[0] / 0.8).softmax(-1) * count
    likely = expected > 5
    chi2 = ((drawn[likely] - expected[likely]) ** 2 / expected[likely]).sum().item()
    # Mean n, variance 2 n: six standard deviations.
    assert chi2 < likely.sum().item() + 6 * (2 * likely.sum().item()) ** 0.5


def test_a_row_alone_and_in_a_batch(rng: torch.Generator) -> None:
    logits = random_logits(rng, ROWS, 2500, DTYPES[-1], 0.25)
    params = random_rows(rng, ROWS)
    together = sampling.fused(logits, params)
    for i in range(0, ROWS, 2):
        assert sampling.fused(logits[i : i + 1].clone(), some(params, slice(i, i + 1))).item() == together[i].item()
    backwards = SamplingRows(*(field.flip(0) for field in params))
    assert torch.equal(sampling.fused(logits.flip(0), backwards).flip(0), together)


def test_no_rows(rng: torch.Generator) -> None:
    got = sampling.fused(torch.empty(0, 100, device=DEVICE), random_rows(rng, 0))
    assert got.shape == (0,)
    assert got.dtype == torch.int64
    nothing = torch.empty(0, dtype=torch.int64, device=DEVICE)
    counts = torch.zeros(2, 100, dtype=torch.int32, device=DEVICE)
    penalties.fused_count(counts, nothing, nothing)
    empty = nothing.float()
    out = penalties.fused(torch.empty(0, 100, device=DEVICE), counts, nothing, empty, empty, empty)
    assert out.shape == (0, 100)


def random_history(rng: torch.Generator, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    prompt = torch.randint(0, vocabulary, (30,), generator=rng, device=DEVICE)
    return prompt, torch.randint(0, vocabulary // 2 + 1, (25,), generator=rng, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 40, 3000])
def test_penalties(rng: torch.Generator, vocabulary: int, dtype: torch.dtype) -> None:
    """Slots filled from lists, then counted token by token, lower what `sampling.apply_penalties` lowers."""
    rows, slots = 7, torch.tensor([4, -1, 0, 7, 2, -1, 5], device=DEVICE)
    poison = torch.full((9, 2 * vocabulary), 12345, dtype=torch.int32, device=DEVICE)
    counts = poison[:8, ::2]
    histories = [random_history(rng, vocabulary) for _ in range(rows)]
    for slot, (prompt, output) in zip(slots.tolist(), histories, strict=True):
        if slot >= 0:
            penalties.fill(counts, slot, prompt, output[:20])
    packed = torch.rand(rows, 3, generator=rng, device=DEVICE)
    packed[:, 2] += 0.5
    packed[0] = torch.tensor([0.0, 0.0, 1.0])
    presence, frequency, repetition = packed.unbind(1)
    logits = random_logits(rng, rows, vocabulary, dtype)
    for i in range(20, 25):
        tokens = torch.stack([output[i] for _, output in histories])
        other = counts.clone()
        penalties.reference_count(other, slots, tokens)
        wide = torch.stack((slots, tokens), 1)
        penalties.fused_count(counts, wide[:, 0], wide[:, 1])
        assert torch.equal(counts, other)
    got = penalties.fused(logits, counts, slots, presence, frequency, repetition)
    torch.testing.assert_close(got, penalties.reference(logits, counts, slots, presence, frequency, repetition))
    for i, (prompt, output) in enumerate(histories):
        want = logits[i].float().clone()
        if slots[i] >= 0:
            sampling.apply_penalties(want, prompt, output, *packed[i].tolist())
        torch.testing.assert_close(got[i], want)
    assert (poison[:, 1::2] == 12345).all(), "another place was written"
    assert (poison[[1, 3, 6, 8]] == 12345).all(), "another slot was written"


def test_a_token_that_is_none_is_not_counted() -> None:
    for count in (penalties.reference_count, penalties.fused_count):
        counts = torch.zeros(3, 10, dtype=torch.int32, device=DEVICE)
        count(counts, torch.tensor([2, 0, -1], device=DEVICE), torch.tensor([INVALID, 9, 3], device=DEVICE))
        assert counts.nonzero().tolist() == [[0, 9]]
        assert counts[0, 9] == 1


def test_logprobs_of_a_token_that_is_none(rng: torch.Generator) -> None:
    logits = random_logits(rng, 2, 30, torch.float32)
    chosen, ids, values = sampling.top_logprobs(logits, torch.tensor([INVALID, 4], device=DEVICE), 3)
    assert chosen.shape == (2,)
    torch.testing.assert_close(chosen[1], logits[1].log_softmax(-1)[4])
    assert ids.shape == values.shape == (2, 3)


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_recorded_in_a_graph(rng: torch.Generator) -> None:
    """Penalties, draw, count and log probabilities wait for nothing: what a graph replays is what they compute anew."""
    rows, vocabulary = 40, 3000
    logits = random_logits(rng, rows, vocabulary, torch.bfloat16)
    params = random_rows(rng, rows)
    counts = torch.zeros(rows, vocabulary, dtype=torch.int32, device=DEVICE)
    slots = torch.arange(rows, device=DEVICE) - 5
    weights = torch.rand(3, rows, generator=rng, device=DEVICE) + 0.5

    def step() -> tuple[torch.Tensor, ...]:
        lowered = penalties.fused(logits, counts, slots, *weights)
        tokens = sampling.fused(lowered, params)
        penalties.fused_count(counts, slots, tokens)
        return tokens, *sampling.top_logprobs(logits, tokens, 5)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step()
    for _ in range(3):
        logits.copy_(random_logits(rng, rows, vocabulary, torch.bfloat16))
        for field, fresh in zip(params, random_rows(rng, rows), strict=True):
            field.copy_(fresh)
        counts.zero_()
        graph.replay()
        counted = counts.clone()
        counts.zero_()
        for got, want in zip(recorded, step(), strict=True):
            assert torch.equal(got, want)
        assert torch.equal(counts, counted)
        assert counts.sum() == rows - 5
