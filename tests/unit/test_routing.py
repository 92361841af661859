"""Every way of routing says what transformers' models of that kind say."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tandem.kernels.routing import METHODS, Routing, route
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

TOKENS, HIDDEN, EXPERTS = 64, 16, 12


def same(got: tuple[torch.Tensor, torch.Tensor], weights: torch.Tensor, ids: torch.Tensor) -> None:
    """The same experts with the same weights, in any order."""
    want = torch.zeros(TOKENS, EXPERTS).scatter_(1, ids, weights.float())
    torch.testing.assert_close(torch.zeros(TOKENS, EXPERTS).scatter_(1, got[1], got[0]), want)
    assert got[0].dtype == torch.float32
    assert got[1].shape == ids.shape


@pytest.mark.parametrize("renormalize", [False, True])
@torch.no_grad()
def test_softmax(rng: torch.Generator, renormalize: bool) -> None:
    config = SimpleNamespace(
        num_experts_per_tok=3, num_experts=EXPERTS, num_local_experts=EXPERTS, hidden_size=HIDDEN,
        norm_topk_prob=renormalize,
    )  # fmt: skip
    router = Qwen3MoeTopKRouter(config)
    router.weight.data = torch.randn(EXPERTS, HIDDEN, generator=rng)
    x = torch.randn(TOKENS, HIDDEN, generator=rng)
    _, weights, ids = router(x)
    same(route(x @ router.weight.T, Routing("softmax", 3, renormalize)), weights, ids)


@pytest.mark.parametrize("renormalize", [False, True])
@torch.no_grad()
def test_sigmoid_grouped(rng: torch.Generator, renormalize: bool) -> None:
    """The correction decides who is chosen, and is in no weight."""
    config = SimpleNamespace(
        num_experts_per_tok=4, num_local_experts=EXPERTS, hidden_size=HIDDEN, routed_scaling_factor=2.5, n_group=4,
        topk_group=2, norm_topk_prob=renormalize,
    )  # fmt: skip
    router = DeepseekV3TopkRouter(config)
    router.weight.data = torch.randn(EXPERTS, HIDDEN, generator=rng)
    router.e_score_correction_bias.copy_(torch.randn(EXPERTS, generator=rng))
    x = torch.randn(TOKENS, HIDDEN, generator=rng)
    logits, weights, ids = router(x)
    routing = Routing("sigmoid_grouped", 4, renormalize, 4, 2, 2.5)
    same(route(logits, routing, router.e_score_correction_bias), weights, ids)


@torch.no_grad()
def test_softmax_grouped(rng: torch.Generator) -> None:
    """DeepSeek-V2's `group_limited_greedy`, spelled out a token at a time."""
    logits = torch.randn(TOKENS, EXPERTS, generator=rng)
    chosen, weights = [], []
    for scores in torch.softmax(logits, -1).tolist():
        groups = sorted(range(4), key=lambda g, s=scores: -max(s[3 * g : 3 * g + 3]))[:2]
        best = sorted((e for g in groups for e in range(3 * g, 3 * g + 3)), key=lambda e, s=scores: -s[e])[:4]
        chosen.append(best)
        weights.append([16.0 * scores[e] for e in best])
    got = route(logits, Routing("softmax_grouped", 4, False, 4, 2, 16.0))
    same(got, torch.tensor(weights), torch.tensor(chosen))


@torch.no_grad()
def test_topk_softmax(rng: torch.Generator) -> None:
    router = GptOssTopKRouter(SimpleNamespace(num_experts_per_tok=3, num_local_experts=EXPERTS, hidden_size=HIDDEN))
    router.weight.data = torch.randn(EXPERTS, HIDDEN, generator=rng)
    router.bias.data = torch.randn(EXPERTS, generator=rng)
    logits, weights, ids = router(torch.randn(TOKENS, HIDDEN, generator=rng))
    same(route(logits, Routing("topk_softmax", 3)), weights, ids)


@pytest.mark.parametrize("method", METHODS)
def test_nobody_to_route(method: str) -> None:
    weights, ids = route(torch.empty(0, 8), Routing(method, 2, True, 2, 1), None)
    assert weights.shape == ids.shape == (0, 2)
