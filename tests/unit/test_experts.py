"""A layer's experts with all that a family may have: another routing, its correction, a scale, shared experts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from tandem.core.config_experts import ExpertsConfig
from tandem.engine.expert_balancer import first_placement
from tandem.engine.expert_parallel import ExpertGroup
from tandem.engine.models.decoder import Decoder
from tandem.engine.models.experts import Experts, experts_spec
from tandem.engine.models.names import destinations, elsewhere
from tandem.engine.models.parameters import Parameters
from tandem.engine.models.spec import ModelSpec, MoeSpec, parse_spec
from tandem.eplb.maps import ExpertMaps
from tandem.kernels.oracle import REFERENCE, select
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

CPU = torch.device("cpu")
HIDDEN, INNER, EXPERTS = 24, 10, 8


def spec_of(moe: MoeSpec) -> ModelSpec:
    llama = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 9, "hidden_size": HIDDEN, "intermediate_size": 8,
        "num_hidden_layers": 2, "num_attention_heads": 2, "rms_norm_eps": 1e-6, "max_position_embeddings": 64,
    }  # fmt: skip
    return replace(parse_spec(llama, {}), moe=moe, moe_layers=frozenset({0, 1}))


def half() -> ExpertGroup:
    """The second rank of two, with two experts more than there are."""
    placement, topology = first_placement(2, EXPERTS, 2, ExpertsConfig(redundant=2), 1)
    return ExpertGroup(1, topology, ExpertMaps(placement, topology, 1, CPU))


@pytest.mark.parametrize("wanted", [None, "torch"])
@torch.no_grad()
def test_deepseek_v3(wanted: str | None) -> None:
    config = transformers.DeepseekV3Config(
        hidden_size=HIDDEN, moe_intermediate_size=INNER, n_routed_experts=EXPERTS, num_experts_per_tok=3, n_group=4,
        topk_group=2, norm_topk_prob=True, routed_scaling_factor=2.5, n_shared_experts=2,
    )  # fmt: skip
    theirs = DeepseekV3MoE(config)
    for tensor in (*theirs.parameters(), theirs.gate.e_score_correction_bias):
        tensor.copy_(torch.randn_like(tensor) / 4)
    moe = MoeSpec(EXPERTS, 3, INNER, True, "sigmoid_grouped", 4, 2, 2.5, shared_inner=2 * INNER)
    spec = spec_of(moe)
    ours = Experts(spec, Parameters(torch.float32, torch.float32, CPU, None, 1), 0, 0)
    ours.router.copy_(theirs.gate.weight)
    assert ours.correction is not None
    assert ours.shared is not None
    ours.correction.copy_(theirs.gate.e_score_correction_bias)
    ours.weights.gate_up.copy_(theirs.experts.gate_up_proj)
    ours.weights.down.copy_(theirs.experts.down_proj)
    shared = theirs.shared_experts
    ours.shared.gate_up.copy_(torch.cat([shared.gate_proj.weight, shared.up_proj.weight]))
    ours.shared.down.copy_(shared.down_proj.weight)
    ops = select(CPU, torch.float32, wanted=wanted and {"moe": wanted}, experts=experts_spec(spec, torch.float32))
    assert ops.moe.name == (wanted or "numba_modular")
    x = torch.randn(33, HIDDEN)
    torch.testing.assert_close(ours(x, ops), theirs(x[None])[0], rtol=1e-5, atol=1e-5)


def test_names_of_what_other_ranks_have() -> None:
    """So that a checkpoint's tensor of another rank's expert is no surprise, and any other is."""
    spec = spec_of(MoeSpec(EXPERTS, 2, INNER, True))
    models = [
        Decoder(
            spec, 64, torch.float32, torch.device("meta"), REFERENCE,
            experts=half() if shared else None,
        )
        for shared in (False, True)
    ]  # fmt: skip
    whole, part = (set(destinations(model)) for model in models)
    assert elsewhere(models[0]) == set()
    assert elsewhere(models[1]) | part == whole
    assert "model.layers.0.mlp.experts.5.up_proj.weight" in part, "slots 5 … 9 hold experts 5, 6, 7, 0, 1"
    assert "model.layers.1.mlp.experts.1.up_proj.weight" in part
    assert elsewhere(models[1]) & part == set()
    assert len(elsewhere(models[1])) == 2 * 3 * 3
