"""Mixture of experts on a GPU, for few tokens: three launches, pair by pair of token and expert.

Few pairs rarely meet in an expert, so nothing is sorted: each reads its expert's weights, shared ones from the cache.
One launch multiplies with the router. The programs of the next find their pair's expert themselves, which saves a
launch, and compute gate, up and SiLU. Those of the last sum over all of a token's choices.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import linear
from .expert_weights import ExpertWeights
from .on_gpu import follow, follows, kernel, next_power_of_2, tl
from .small_linear import row_products, silu_pairs, step_depth, weight_rows


class Plan(NamedTuple):
    """How the two products are cut; see `small_linear.Gemv`.

    Args:
        rows: of gate and up together, multiplied at a time.
        groups: of rows, one after the other, of a program, which has to find its expert first.
        depth: their columns in a step.
        warps: of a program.
        stages: steps in flight through shared memory; 1: loads go to registers.
        down_columns: outputs of a program, each of all choices.
        down_depth: inner columns in a step.
        down_warps: of a program.
        down_stages: likewise.
    """

    rows: int
    groups: int
    depth: int
    warps: int
    stages: int
    down_columns: int
    down_depth: int
    down_warps: int
    down_stages: int


class Entry(NamedTuple):
    """Up to how many pairs a plan serves."""

    max_pairs: int
    plan: Plan


PLANS = (
    Entry(8, Plan(8, 4, 1024, 4, 1, 4, 256, 4, 1)),
    Entry(64, Plan(8, 8, 1024, 4, 1, 4, 256, 4, 1)),
)
"""The first entry that is large enough serves. Estimates for an H100, 128 experts of 2048 × 768 and bfloat16, which
`python -m tandem.bench.kernels moe` compares with others."""

MAX_EXPERTS = 256
"""Ranking compares each expert with each."""
_EXPERTS_PER_PAIR = 4
"""With fewer, too many pairs would share an expert, and reading it once for all of them is faster."""


def serves(tokens: int, experts: int, top_k: int) -> bool:
    """Whether `fused` is the faster way: one token, or so few that they hardly meet in an expert."""
    pairs = tokens * top_k
    alone = tokens == 1 or pairs * _EXPERTS_PER_PAIR <= experts
    return alone and pairs <= PLANS[-1].max_pairs and experts <= MAX_EXPERTS


def most_tokens(experts: int, top_k: int) -> int:
    """The largest number that `serves` accepts."""
    most = PLANS[-1].max_pairs // max(1, top_k)
    return max((tokens for tokens in range(1, most + 1) if serves(tokens, experts, top_k)), default=0)


def fused(
    x: Tensor, router: Tensor, gate_up: Tensor, down: Tensor, top_k: int, renormalize: bool, plan: Plan | None = None
) -> Tensor:
    """`moe.reference` for at least one token and at most `MAX_EXPERTS` experts; ``plan`` instead of the table's."""
    pairs = len(x) * top_k
    chosen = torch.empty(pairs, dtype=torch.int32, device=x.device)
    weights = torch.empty(pairs, dtype=torch.float32, device=x.device)
    return _multiply(x, linear.fused(x, router), chosen, weights, gate_up, down, top_k, renormalize, plan)


def fused_experts(x: Tensor, weights: Tensor, ids: Tensor, experts: ExpertWeights, plan: Plan | None = None) -> Tensor:
    """`moe.reference_experts` for at least one token, SiLU and no biases; ``plan`` instead of the table's."""
    chosen, weights = ids.to(torch.int32).contiguous(), weights.contiguous()
    return _multiply(x, None, chosen, weights, *experts.plain(), ids.shape[1], False, plan)


def _multiply(
    x: Tensor, logits: Tensor | None, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, top_k: int,
    renormalize: bool, plan: Plan | None,
) -> Tensor:  # fmt: skip
    """With ``logits``, ``chosen`` and ``weights`` are written before they are read."""
    tokens, hidden = x.shape
    experts, inner = len(gate_up), down.shape[2]
    pairs = tokens * top_k
    plan = plan or next(entry.plan for entry in PLANS if pairs <= entry.max_pairs)
    activated = torch.empty(pairs, inner, dtype=x.dtype, device=x.device)
    out = torch.empty(tokens, hidden, dtype=x.dtype, device=x.device)
    slots, routed = next_power_of_2(top_k), logits is None
    depth = step_depth(hidden, plan.depth)
    _gate_up_kernel[(pairs, -(-2 * inner // (plan.rows * plan.groups)))](
        x, x if logits is None else logits, gate_up, activated, chosen, weights, experts, hidden, inner, x.stride(0),
        gate_up.stride(0), next_power_of_2(experts), top_k, renormalize, hidden % depth == 0, plan.rows, plan.groups,
        depth, plan.stages, routed,
        num_warps=plan.warps, **follows(x.device),
    )  # fmt: skip
    depth = step_depth(inner, plan.down_depth)
    _down_kernel[(tokens, -(-hidden // plan.down_columns))](
        activated, down, chosen, weights, out, hidden, inner, down.stride(0), top_k, slots, inner % depth == 0,
        plan.down_columns, depth, plan.down_stages, routed, num_warps=plan.down_warps, **follows(x.device),
    )  # fmt: skip
    return out


@kernel
def _choose(  # type: ignore[no-untyped-def]
    logits, choice, experts, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, RENORMALIZE: tl.constexpr
):
    """Of one token: the expert that ranks ``choice``-th, and its weight. Of equal ones the first comes first."""
    at = tl.arange(0, EXPERTS)
    value = tl.load(logits + at, mask=at < experts, other=float("-inf")).to(tl.float32)
    share = tl.exp(value - tl.max(value, axis=0))
    # Integers in the order of the logits, and no two alike.
    bits = value.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    if logits.dtype.element_ty == tl.float32:
        key = (key.to(tl.int64) << 32) + (EXPERTS - 1 - at)
    else:
        # A float16 or bfloat16 leaves the last 13 bits of a float32 to us.
        key = (key & -8192) + (EXPERTS - 1 - at)
    rank = tl.sum((key[:, None] > key[None, :]).to(tl.int32), axis=0)
    if RENORMALIZE:
        total = tl.sum(tl.where(rank < TOP_K, share, 0.0), axis=0)
    else:
        total = tl.sum(share, axis=0)
    # In range even where a logit is NaN, and what fills the experts up ranks before it.
    expert = tl.minimum(tl.sum(tl.where(rank == choice, at, 0), axis=0), experts - 1)
    return expert, tl.sum(tl.where(rank == choice, share, 0.0), axis=0) / total


@kernel
def _gate_up_kernel(  # type: ignore[no-untyped-def]
    x, logits, gate_up, activated, chosen, weights, experts, hidden, inner, x_stride, expert_stride,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, RENORMALIZE: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr,
    GROUPS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, ROUTED: tl.constexpr, FOLLOW: tl.constexpr,
):  # fmt: skip
    """One pair and some of gate and up. Unless the pairs are ``ROUTED``, finds its expert, and says which it was."""
    follow(FOLLOW)
    pair = tl.program_id(0)
    token = (pair // TOP_K).to(tl.int64)
    if ROUTED:
        expert = tl.load(chosen + pair)
        if expert < 0:
            return
    else:
        expert, weight = _choose(logits + token * experts, pair % TOP_K, experts, EXPERTS, TOP_K, RENORMALIZE)
        if tl.program_id(1) == 0:
            tl.store(chosen + pair, expert)
            tl.store(weights + pair, weight)
    base = gate_up + expert.to(tl.int64) * expert_stride
    for group in range(GROUPS):
        block = tl.program_id(1) * GROUPS + group
        row = base + weight_rows(block, inner, ROWS, True) * hidden
        total = row_products(x + token * x_stride, 0, 0, row, hidden, EVEN, 1, ROWS, DEPTH, STAGES)[0]
        value = silu_pairs(total[None, :], activated.dtype.element_ty, 1, ROWS)
        column = block * (ROWS // 2) + tl.arange(0, ROWS // 2)[None, :]
        tl.store(activated + pair * inner + column, value, mask=column < inner)


@kernel
def _down_kernel(  # type: ignore[no-untyped-def]
    activated, down, chosen, weights, out, hidden, inner, expert_stride, TOP_K: tl.constexpr, SLOTS: tl.constexpr,
    EVEN: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, ROUTED: tl.constexpr,
    FOLLOW: tl.constexpr,
):  # fmt: skip
    """One token and some outputs: each row of the tile is one output of one choice."""
    follow(FOLLOW)
    token = tl.program_id(0)
    at, depth = tl.arange(0, SLOTS * COLUMNS), tl.arange(0, DEPTH)
    column = tl.program_id(1) * COLUMNS + at % COLUMNS
    pair = token * TOP_K + at // COLUMNS
    there = at < TOP_K * COLUMNS
    expert = tl.load(chosen + pair, mask=there, other=0).to(tl.int64)
    if ROUTED:  # others' pairs are negative
        there = there & (expert >= 0)
        expert = tl.maximum(expert, 0)
    share = tl.load(weights + pair, mask=there, other=0.0)
    row = down + expert * expert_stride + tl.minimum(column, hidden - 1).to(tl.int64) * inner
    source = activated + tl.where(there, pair, 0) * inner
    total = tl.zeros((SLOTS * COLUMNS, DEPTH), tl.float32)
    for k in tl.range(0, inner, DEPTH, num_stages=STAGES):
        place = k + depth[None, :]
        inside = there[:, None]
        if not EVEN:
            inside = inside & (place < inner)
        weight = tl.load(row[:, None] + place, mask=inside, other=0.0).to(tl.float32)
        total += weight * tl.load(source[:, None] + place, mask=inside, other=0.0).to(tl.float32)
    scaled = tl.reshape(tl.sum(total, axis=1) * share, (SLOTS, COLUMNS))
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    place = out + token.to(tl.int64) * hidden + column
    tl.store(place, tl.sum(scaled, axis=0).to(out.dtype.element_ty), mask=column < hidden)
