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
from .compiled import compiled

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
        logits: [rows, vocabulary], any floating dtype.
        rows: parameters.

    Returns:
        [rows] int64; `INVALID` where a row has no answer.
    """
    wide = logits.double()
    broken = wide.isnan().any(-1) | (wide == -math.inf).all(-1)
    wide = wide.masked_fill(broken.unsqueeze(1), 0.0)
    greedy = wide.argmax(-1)
    temperature = rows.temperature.double().unsqueeze(1)
    scaled = wide / torch.where(temperature > 0, temperature, 1.0)
    scaled = scaled - scaled.max(-1, keepdim=True).values
    scaled = scaled.masked_fill(scaled.exp() < rows.min_p.double().unsqueeze(1), -math.inf)
    ordered, ids = scaled.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[1], device=logits.device).unsqueeze(0)
    top_k = torch.where(rows.top_k > 0, rows.top_k, logits.shape[1]).unsqueeze(1)
    ordered = ordered.masked_fill(rank >= top_k, -math.inf)
    shares = ordered.softmax(-1)
    before = shares.cumsum(-1) - shares
    nucleus = (before < rows.top_p.double().unsqueeze(1)) | (rows.top_p.unsqueeze(1) >= 1)
    ordered = ordered.masked_fill(~nucleus, -math.inf)
    kept = torch.full_like(scaled, -math.inf).scatter_(1, ids, ordered)
    drawn = (kept + _gumbel(rows.seed, rows.position, logits.shape[1])).argmax(-1)
    token = torch.where(rows.temperature > 0, drawn, greedy)
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
        tokens: [rows] int64, the chosen tokens.
        num_top: alternatives wanted, ≥ 0.

    Returns:
        (chosen [rows], ids [rows, num_top] int64, values [rows, num_top]), float32, likeliest first.
    """
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    chosen = logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1)
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
        top = np.float64(logits[r, best]) / np.float64(temperature[r])
        for i in range(vocabulary):
            keys[i] = np.float64(logits[r, i]) / np.float64(temperature[r]) - top
        if top_k[r] <= 0 and top_p[r] >= 1 and min_p[r] <= 0:
            out[r] = _draw(keys, ids, vocabulary, False, stream)
            continue
        least = -math.inf
        if min_p[r] > 0:
            least = math.log(np.float64(min_p[r]))
        if 0 < top_k[r] < vocabulary:
            least = max(least, np.partition(keys, vocabulary - top_k[r])[vocabulary - top_k[r]])
        if top_p[r] < 1:
            total = 0.0
            for i in range(vocabulary):
                if keys[i] >= least:
                    total += math.exp(keys[i])
            # Tokens below this share hold less than 1 − top_p together, so that the nucleus lies above.
            least = max(least, math.log((1.0 - np.float64(top_p[r])) * total / vocabulary) - 1e-9)
        count = 0
        for i in range(vocabulary):
            if keys[i] >= least:
                kept[count] = keys[i]
                ids[count] = i
                count += 1
        order = np.argsort(-kept[:count], kind="mergesort")
        if 0 < top_k[r] < count:
            count = top_k[r]
        if top_p[r] < 1:
            total = 0.0
            if 0 < top_k[r] < vocabulary:
                for j in range(count):
                    total += math.exp(kept[order[j]])
            else:
                for i in range(vocabulary):
                    if min_p[r] <= 0 or keys[i] >= math.log(np.float64(min_p[r])):
                        total += math.exp(keys[i])
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
