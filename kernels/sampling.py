"""Choosing tokens, with randomness that depends on the request's seed and the token's position alone.

A token is drawn by the Gumbel-max trick: the argmax of logits / temperature plus noise, where the noise of vocabulary
entry i is a function of (seed, position, i). Whatever worker computes the same logits draws the same token, in any
batch. And the draw is as robust as the greedy choice: logits that differ in the last bits change it about as rarely.

The generator is SplitMix64 (`core.randomness`) used as a counter: the i-th output of the stream that (seed, position)
starts, computed directly.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..core.randomness import GAMMA, MIX1, MIX2, WORD, stream_key
from . import candidates
from .compiled import compiled
from .on_gpu import kernel, kernel_varying, next_power_of_2, tl

_CHUNK = 2048
"""Entries among which one program finds a winner."""

INVALID = -1
"""What stands for a token where the logits hold a NaN, or nothing but −∞."""


class SamplingRows(NamedTuple):
    """Parameters of the rows of a batch, each [rows]."""

    temperature: Tensor
    """float32; 0: greedy."""
    top_k: Tensor
    """int64; 0: all."""
    top_p: Tensor
    """float32 in (0, 1]."""
    min_p: Tensor
    """float32 in [0, 1]: of the likeliest token's probability."""
    seed: Tensor
    """int64 ≥ 0."""
    position: Tensor
    """int64: of the token that is being chosen."""


def reference(logits: Tensor, rows: SamplingRows) -> Tensor:
    """One token a row.

    Filters apply after temperature, in this order: min_p, top_k, top_p. Among equal logits the smaller id comes first.

    Args:
        logits: [rows, vocabulary], any floating dtype. Entries of +∞ are equally likely, and nothing else is.
        rows: parameters.

    Returns:
        [rows] int64; `INVALID` where a row has no answer.
    """
    broken = logits.isnan().any(-1) | (logits == -math.inf).all(-1)
    whole = logits.masked_fill(broken.unsqueeze(1), 0.0)
    value, last = candidates.reference(whole, rows.temperature, rows.top_k, rows.top_p, rows.min_p)
    least, ids = value.unsqueeze(1), torch.arange(logits.shape[1], device=logits.device)
    kept = (whole > least) | ((whole == least) & (ids <= last.unsqueeze(1)))
    keys = candidates.scale(whole, rows.temperature).masked_fill(~kept, -math.inf)
    drawn = (keys + _gumbel(rows.seed, rows.position, logits.shape[1])).argmax(-1)
    token = torch.where(rows.temperature > 0, drawn, whole.argmax(-1))
    return token.masked_fill(broken, INVALID)


def greedy(logits: Tensor) -> Tensor:
    """`reference` where every temperature is 0."""
    values, ids = logits.max(-1)
    return ids.masked_fill(values.isnan() | (values == -math.inf), INVALID)


def native(logits: Tensor, rows: SamplingRows) -> Tensor:
    """`reference` for float32 logits on a CPU."""
    out = np.empty(logits.shape[0], np.int64)
    _sample(
        logits.numpy(),
        rows.temperature.numpy(),
        rows.top_k.numpy(),
        rows.top_p.numpy(),
        rows.min_p.numpy(),
        rows.seed.numpy(),
        rows.position.numpy(),
        out,
    )
    return torch.from_numpy(out)


def fused(logits: Tensor, rows: SamplingRows) -> Tensor:
    """`reference` on a GPU, without a word to the host.

    A row is cut into chunks of a size that does not depend on the batch, so that it draws the same token in any.

    Args:
        logits: [rows, vocabulary ≤ 2²⁴] float32, float16 or bfloat16, rows of any stride.
        rows: parameters, of any stride.
    """
    count, vocabulary = logits.shape
    out = torch.empty(count, dtype=torch.int64, device=logits.device)
    if not count:
        return out
    least, last = candidates.fused(logits, rows.temperature, rows.top_k, rows.top_p, rows.min_p)
    chunks = -(-vocabulary // _CHUNK)
    tops = torch.empty(count, chunks, dtype=torch.float32, device=logits.device)
    times, ids = torch.empty_like(tops), torch.empty_like(tops, dtype=torch.int32)
    _draw_kernel[(count, chunks)](
        logits, rows.temperature, rows.seed, rows.position, least, last, tops, times, ids, vocabulary, chunks,
        logits.stride(0), rows.temperature.stride(0), rows.seed.stride(0), rows.position.stride(0),
        GAMMA, MIX1, MIX2, _CHUNK, num_warps=4,
    )  # fmt: skip
    _choose_kernel[(count,)](
        rows.temperature, tops, times, ids, out, chunks, rows.temperature.stride(0), INVALID, next_power_of_2(chunks),
        num_warps=1,
    )  # fmt: skip
    return out


@kernel_varying("temperatures", "seeds", "positions")
def _draw_kernel(  # type: ignore[no-untyped-def]
    logits, temperatures, seeds, positions, least, last, tops, times, ids, vocabulary, chunks,
    row_stride, temperature_stride, seed_stride, position_stride,
    GAMMA: tl.constexpr, MIX1: tl.constexpr, MIX2: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The entry that wins a chunk.

    The argmax of key − log(time), the times exponential, is the argmin of time · e^(−key): one logarithm less, and
    nothing lost to float32 where keys are large.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + row * row_stride + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32)
    broken = tl.max((x != x).to(tl.int32), axis=0) > 0
    x = tl.where(x == x, x, float("-inf"))
    top = tl.max(x, axis=0)
    temperature = tl.load(temperatures + row * temperature_stride)
    if temperature > 0:
        value = tl.load(least + row)
        kept = (x > value) | ((x == value) & (at <= tl.load(last + row)))
        seed = tl.load(seeds + row * seed_stride).to(tl.uint64)
        position = tl.load(positions + row * position_stride).to(tl.uint64)
        stream = _mix(_mix(seed, MIX1, MIX2) + (position + 1) * GAMMA, MIX1, MIX2)
        word = _mix(stream + (at + 1).to(tl.uint64) * GAMMA, MIX1, MIX2)
        scaled = _exponential(word) * _growth(x, top, temperature)
        time, winner = tl.min(tl.where(kept, scaled, float("inf")), axis=0, return_indices=True)
    else:
        time, winner = tl.min(tl.where(x == top, 0.0, float("inf")), axis=0, return_indices=True)
    place = row * chunks + tl.program_id(1)
    tl.store(tops + place, tl.where(broken, float("nan"), top))
    tl.store(times + place, time)
    tl.store(ids + place, tl.program_id(1) * CHUNK + winner)


@kernel_varying("temperatures")
def _choose_kernel(  # type: ignore[no-untyped-def]
    temperatures, tops, times, ids, out, chunks, temperature_stride, INVALID: tl.constexpr, CHUNKS: tl.constexpr
):
    """The winner among the chunks' winners, whose times count from each chunk's own top."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, CHUNKS)
    tops_here = tl.load(tops + row * chunks + chunk, mask=chunk < chunks, other=float("-inf"))
    time = tl.load(times + row * chunks + chunk, mask=chunk < chunks, other=float("inf"))
    broken = tl.max((tops_here != tops_here).to(tl.int32), axis=0) > 0
    top = tl.max(tl.where(tops_here == tops_here, tops_here, float("-inf")), axis=0)
    temperature = tl.load(temperatures + row * temperature_stride)
    if temperature > 0:
        time *= _growth(tops_here, top, temperature)
    else:
        time = tl.where(tops_here == top, 0.0, float("inf"))
    _, winner = tl.min(time, axis=0, return_indices=True)
    token = tl.load(ids + row * chunks + winner).to(tl.int64)
    tl.store(out + row, tl.where(broken | (top == float("-inf")), INVALID, token))


@kernel
def _mix(z, MIX1: tl.constexpr, MIX2: tl.constexpr):  # type: ignore[no-untyped-def]
    """`core.randomness.mix64` of uint64."""
    z = (z ^ (z >> 30)) * MIX1
    z = (z ^ (z >> 27)) * MIX2
    return z ^ (z >> 31)


@kernel
def _exponential(word):  # type: ignore[no-untyped-def]
    """−log(u), float32, of u = (⌊word / 2¹¹⌋ + ½) / 2⁵³."""
    signed = word.to(tl.int64, bitcast=True)
    upper = signed < 0
    # The lesser of u and 1 − u: u itself would round to 1.
    small = (((signed ^ (signed >> 63)) >> 11).to(tl.float32) + 0.5) * 1.1102230246251565e-16
    bits = small.to(tl.int32, bitcast=True)
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    exponent = (127 - (bits >> 23)).to(tl.float32)
    # −log(1 − w) = 2 artanh(w / (2 − w)): to 3e-8 where |w| ≤ 1/2 or, for a mantissa, −1 < w ≤ 0.
    w = tl.where(upper, small, 1 - mantissa)
    ratio = w / (2 - w)
    square = ratio * ratio
    series = 1 / 3 + square * (1 / 5 + square * (1 / 7 + square * (1 / 9 + square * (1 / 11 + square * (1 / 13)))))
    return tl.where(upper, 0.0, exponent * 0.6931471805599453) + 2 * ratio * (1 + square * series)


@kernel
def _growth(x, top, temperature):  # type: ignore[no-untyped-def]
    """e^((top − x) / temperature), but 2⁶⁰ at most: times lie between 2⁻⁵⁴ and 38, and what is so far away has lost."""
    scale = 1.4426950408889634 / tl.maximum(temperature, 1e-30)  # of exponents to base 2
    return tl.exp2(tl.clamp((tl.clamp(top, -3.4028234663852886e38, 3.4028234663852886e38) - x) * scale, 0.0, 60.0))


def apply_penalties(
    row: Tensor, prompt: Tensor, output: Tensor, presence: float, frequency: float, repetition: float
) -> None:
    """Lower, in place, the logits of tokens that were seen.

    Args:
        row: [vocabulary] logits.
        prompt: [n] int64 token ids of the prompt: they count for repetition alone.
        output: [m] int64 token ids produced so far.
        presence: subtracted once from each output token.
        frequency: subtracted for every occurrence in the output.
        repetition: positive logits are divided by it and negative ones multiplied, for tokens of prompt and output.
    """
    if repetition != 1:
        seen = torch.cat((prompt, output)).unique()
        values = row[seen]
        row[seen] = torch.where(values > 0, values / repetition, values * repetition)
    if (presence != 0 or frequency != 0) and len(output):
        ids, counts = output.unique(return_counts=True)
        row[ids] -= presence + frequency * counts.to(row.dtype)


def top_logprobs(logits: Tensor, tokens: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log probabilities of the model itself.

    Args:
        logits: [rows, vocabulary].
        tokens: [rows] int64, the chosen tokens; the log probability of `INVALID` is another's.
        num_top: alternatives wanted, ≥ 0.

    Returns:
        (chosen [rows], ids [rows, num_top] int64, values [rows, num_top]), float32, likeliest first.
    """
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    chosen = logprobs.gather(1, tokens.clamp(min=0).unsqueeze(1)).squeeze(1)
    values, ids = logprobs.topk(min(num_top, logits.shape[1]), dim=-1)
    return chosen, ids, values


def _signed(z: int) -> int:
    return z - WORD if z >= WORD >> 1 else z


def _gumbel(seed: Tensor, position: Tensor, vocabulary: int) -> Tensor:
    """[rows, vocabulary] float64 of standard Gumbel noise."""
    keys = [_signed(stream_key(s, p)) for s, p in zip(seed.tolist(), position.tolist(), strict=True)]
    z = torch.tensor(keys, dtype=torch.int64, device=seed.device).unsqueeze(1)
    z = z + (torch.arange(vocabulary, device=seed.device) + 1) * _signed(GAMMA)
    z = (z ^ _shift(z, 30)) * _signed(MIX1)
    z = (z ^ _shift(z, 27)) * _signed(MIX2)
    z = z ^ _shift(z, 31)
    uniform = (_shift(z, 11).double() + 0.5) * 2.0**-53
    return -torch.log(-torch.log(uniform))


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


@compiled
def _mix64(z: np.uint64) -> np.uint64:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(MIX1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(MIX2)
    return z ^ (z >> np.uint64(31))


@compiled
def _draw(keys: np.ndarray, ids: np.ndarray, count: int, use_ids: bool, stream: np.uint64) -> int:
    """Index into ``keys`` of the largest key + noise among the first ``count``."""
    best = -math.inf
    winner = -1
    for i in range(count):
        key = keys[i]
        if key == -math.inf:
            continue
        entry = ids[i] if use_ids else i
        v = _mix64(stream + np.uint64(entry + 1) * np.uint64(GAMMA)) >> np.uint64(11)
        uniform = (np.float64(v) + 0.5) * 2.0**-53
        # Noise reaches best − key only if 1 − uniform < e^(key − best): for far keys that needs no logarithm.
        if best - key > 14.0 and uniform < 1.0 - 1e-6:
            continue
        noisy = key - math.log(-math.log(uniform))
        if noisy > best:
            best = noisy
            winner = i
    return winner


@compiled
def _sample(
    logits: np.ndarray,
    temperature: np.ndarray,
    top_k: np.ndarray,
    top_p: np.ndarray,
    min_p: np.ndarray,
    seed: np.ndarray,
    position: np.ndarray,
    out: np.ndarray,
) -> None:
    rows, vocabulary = logits.shape
    keys = np.empty(vocabulary, np.float64)
    kept = np.empty(vocabulary, np.float64)
    ids = np.empty(vocabulary, np.int64)
    for r in range(rows):
        best = 0
        broken = False
        for i in range(vocabulary):
            if logits[r, i] != logits[r, i]:
                broken = True
            if logits[r, i] > logits[r, best]:
                best = i
        if broken or logits[r, best] == -math.inf:
            out[r] = INVALID
            continue
        if temperature[r] <= 0:
            out[r] = best
            continue
        stream = _mix64(_mix64(np.uint64(seed[r])) + np.uint64(position[r] + 1) * np.uint64(GAMMA))
        top = np.float64(logits[r, best])
        for i in range(vocabulary):
            below = np.float64(logits[r, i]) - top if logits[r, i] != logits[r, best] else 0.0
            keys[i] = below / np.float64(temperature[r])
        if top_k[r] <= 0 and top_p[r] >= 1 and min_p[r] <= 0:
            out[r] = _draw(keys, ids, vocabulary, False, stream)
            continue
        least = -math.inf
        if min_p[r] > 0:
            least = math.log(np.float64(min_p[r]))
        limit = vocabulary
        if 0 < top_k[r] < vocabulary:
            limit = top_k[r]
            least = max(least, np.partition(keys, vocabulary - limit)[vocabulary - limit])
        total = 0.0
        if top_p[r] < 1:
            # What min_p and top_k left; of entries equal to the last, as many as top_k has room for.
            equal = 0
            above = 0
            for i in range(vocabulary):
                if keys[i] > least:
                    total += math.exp(keys[i])
                    above += 1
                elif keys[i] == least:
                    equal += 1
            if equal > 0:
                total += min(equal, limit - above) * math.exp(least)
            # Tokens below this share hold less than 1 − top_p together, so that the nucleus lies above.
            least = max(least, math.log((1.0 - np.float64(top_p[r])) * total / vocabulary) - 1e-9)
        count = 0
        for i in range(vocabulary):
            if keys[i] >= least:
                kept[count] = keys[i]
                ids[count] = i
                count += 1
        order = np.argsort(-kept[:count], kind="mergesort")
        count = min(count, limit)
        if top_p[r] < 1:
            before = 0.0
            for j in range(count):
                if before >= np.float64(top_p[r]) * total:
                    count = j
                    break
                before += math.exp(kept[order[j]])
        sorted_keys = np.empty(count, np.float64)
        sorted_ids = np.empty(count, np.int64)
        for j in range(count):
            sorted_keys[j] = kept[order[j]]
            sorted_ids[j] = ids[order[j]]
        out[r] = sorted_ids[_draw(sorted_keys, sorted_ids, count, True, stream)]
