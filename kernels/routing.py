"""Which experts a token goes to, and with what weight: every way that the supported families route.

All take the router's logits, so that the product with the router, its bias and its dtype are the caller's. Sums and
comparisons are in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import on_gpu
from .on_gpu import kernel, next_power_of_2, tl

_MAX_FUSED_EXPERTS = 1024
"""That one warp looks through."""


class Routing(NamedTuple):
    """How the tokens of a layer choose.

    Args:
        method: one of `METHODS`.
        top_k: experts a token.
        renormalize: make the weights of the chosen sum to one.
        num_groups: of equally many experts, in order; with the grouped methods.
        top_groups: groups from which a token chooses.
        scale: of the weights, at last.
    """

    method: str
    top_k: int
    renormalize: bool = False
    num_groups: int = 1
    top_groups: int = 1
    scale: float = 1.0


def route(logits: Tensor, routing: Routing, correction: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Each token's experts and their weights.

    Args:
        logits: [tokens, experts], with the router's bias if it has one.
        routing: how.
        correction: [experts], added to the scores by which "sigmoid_grouped" chooses, and not to the weights.

    Returns:
        (weights [tokens, top_k] float32, experts [tokens, top_k] int64), the best first.
    """
    if logits.is_cuda and on_gpu.AVAILABLE and fuses(routing, logits.shape[1]):
        return fused(logits, routing)
    weights, experts = METHODS[routing.method](logits.float(), routing, correction)
    return (weights if routing.scale == 1.0 else weights * routing.scale), experts


def fuses(routing: Routing, num_experts: int) -> bool:
    """Whether `fused` can route like this."""
    return routing.method in ("softmax", "topk_softmax") and num_experts <= _MAX_FUSED_EXPERTS


def fused(logits: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """`route` on a GPU in one launch, where `fuses` allows it."""
    tokens, experts = logits.shape
    weights = torch.empty(tokens, routing.top_k, dtype=torch.float32, device=logits.device)
    ids = torch.empty(tokens, routing.top_k, dtype=torch.int64, device=logits.device)
    # The softmax of the chosen is that of all, made to sum to one.
    renormalize = routing.renormalize or routing.method == "topk_softmax"
    if tokens:
        _route_kernel[(tokens,)](
            logits, weights, ids, experts, logits.stride(0), routing.scale, next_power_of_2(experts), routing.top_k,
            next_power_of_2(routing.top_k), renormalize, num_warps=1,
        )  # fmt: skip
    return weights, ids


@kernel
def _route_kernel(  # type: ignore[no-untyped-def]
    logits, weights, ids, experts, stride, scale, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr,
    RENORMALIZE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    at, slot = tl.arange(0, EXPERTS), tl.arange(0, SLOTS)
    value = tl.load(logits + token * stride + at, mask=at < experts, other=float("-inf")).to(tl.float32)
    share = tl.exp(value - tl.max(value, axis=0))
    total = tl.sum(share, axis=0)
    broken = total != total
    # Where numbers are none, the threads of a program would not agree on the largest.
    share = tl.where(broken, 1.0, share / total)
    share = tl.where(at < experts, share, -1.0)
    weight = tl.zeros((SLOTS,), tl.float32)
    expert = tl.zeros((SLOTS,), tl.int32)
    for k in tl.static_range(TOP_K):
        best = tl.argmax(share, axis=0)
        weight = tl.where(slot == k, tl.max(share, axis=0), weight)
        expert = tl.where(slot == k, best, expert)
        share = tl.where(at == best, -1.0, share)
    if RENORMALIZE:
        weight = weight / tl.sum(weight, axis=0)
    weight = tl.where(broken, float("nan"), weight * scale)
    tl.store(weights + token * TOP_K + slot, weight, mask=slot < TOP_K)
    tl.store(ids + token * TOP_K + slot, expert.to(tl.int64), mask=slot < TOP_K)


def _softmax(logits: Tensor, routing: Routing, correction: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax over all, then the best (Mixtral, Qwen3)."""
    weights, experts = torch.softmax(logits, dim=-1).topk(routing.top_k, dim=-1)
    return _normalized(weights, routing), experts


def _softmax_grouped(logits: Tensor, routing: Routing, correction: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax over all; the groups with the best expert; of those the best (DeepSeek-V2, arXiv:2405.04434)."""
    scores = torch.softmax(logits, dim=-1)
    groups = scores.unflatten(-1, (routing.num_groups, -1)).amax(-1)
    # As the published code does it: what is left out counts as zero.
    weights, experts = _within(scores, groups, routing, 0.0).topk(routing.top_k, dim=-1)
    return _normalized(weights, routing), experts


def _sigmoid_grouped(logits: Tensor, routing: Routing, correction: Tensor | None) -> tuple[Tensor, Tensor]:
    """A sigmoid each; the groups whose two best sum to most; of those the best (DeepSeek-V3, arXiv:2412.19437)."""
    scores = torch.sigmoid(logits)
    choice = scores if correction is None else scores + correction.float()
    split = choice.unflatten(-1, (routing.num_groups, -1))
    groups = split.topk(min(2, split.shape[-1]), dim=-1).values.sum(-1)
    experts = _within(choice, groups, routing, float("-inf")).topk(routing.top_k, dim=-1).indices
    weights = scores.gather(-1, experts)
    return _normalized(weights, routing, 1e-20), experts


def _topk_softmax(logits: Tensor, routing: Routing, correction: Tensor | None) -> tuple[Tensor, Tensor]:
    """The best logits, then softmax over these (gpt-oss, arXiv:2508.10925)."""
    chosen, experts = logits.topk(routing.top_k, dim=-1)
    return torch.softmax(chosen, dim=-1), experts


METHODS: dict[str, Callable[[Tensor, Routing, Tensor | None], tuple[Tensor, Tensor]]] = {
    "softmax": _softmax,
    "softmax_grouped": _softmax_grouped,
    "sigmoid_grouped": _sigmoid_grouped,
    "topk_softmax": _topk_softmax,
}
"""Routing method → its reference."""


def _within(scores: Tensor, groups: Tensor, routing: Routing, other: float) -> Tensor:
    """The scores of the best groups' experts; ``other`` for the rest."""
    best = groups.topk(routing.top_groups, dim=-1).indices
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True)
    return scores.masked_fill(~kept.repeat_interleave(scores.shape[-1] // routing.num_groups, dim=-1), other)


def _normalized(weights: Tensor, routing: Routing, tiny: float = 0.0) -> Tensor:
    return weights / (weights.sum(-1, keepdim=True) + tiny) if routing.renormalize else weights
