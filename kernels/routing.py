"""Which experts a token goes to, and with what weight: every way that the supported families route.

All take the router's logits, so that the product with the router, its bias and its dtype are the caller's. Sums and
comparisons are in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


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
    weights, experts = METHODS[routing.method](logits.float(), routing, correction)
    return (weights if routing.scale == 1.0 else weights * routing.scale), experts


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
