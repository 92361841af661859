"""What the kernels' benchmark measures, and how it tells; measuring itself needs a GPU."""

from __future__ import annotations

import pytest
import torch
from tandem.bench import latents, packed
from tandem.bench.kernels import MODELS, Figure, Product, main, plans, products, summary
from tandem.core.errors import ConfigError
from tandem.engine.models.spec import parse_spec
from tandem.kernels.small_linear import MAX_TOKENS, Tile


def test_the_products_of_a_step() -> None:
    dense, mixture = (parse_spec(MODELS[name], {}, name) for name in ("qwen3-8b", "qwen3-30b-a3b"))
    assert products(dense, 1) == [
        Product("qkv", 6144, 4096),
        Product("o", 4096, 4096),
        Product("gate_up", 24576, 4096, gated=True),
        Product("down", 4096, 12288),
        Product("head", 151936, 4096),
    ]
    assert products(mixture, 8) == [
        Product("qkv", (4 + 2) * 128, 2048),
        Product("o", 2048, 512),
        Product("router", 128, 2048),
        Product("head", 18992, 2048),
    ]


@pytest.mark.parametrize("tokens", [1, 2, 4, 8, 16, 32, MAX_TOKENS])
def test_plans_are_few_and_leave_no_processor_idle(tokens: int) -> None:
    for shape in (Product("", 151936, 4096), Product("", 4096, 4096), Product("", 768, 4096)):
        found = plans(shape, tokens, 132)
        assert 7 <= len(set(found)) == len(found) <= 13
        for plan in found:
            if isinstance(plan, Tile):
                assert shape.outputs // plan.rows * plan.splits >= 66


def test_the_table() -> None:
    figures = [Figure("cuBLAS", 20.0, 0.0), Figure("a", None, 0.5, "wrong"), Figure("b", 10.0, 0.0)]
    good, bad = Product("o", 1000, 10_000), Product("qkv", 1, 1)
    text = summary([(good, 1, "cuBLAS", figures), (good, 2, "b", figures), (bad, 1, "a", figures[1:2])], 2)
    assert text[1].split() == ["o", "1", "20.00us", "1000", "20.00us", "1000", "10.00us", "2000", "2.000", "b,", "table:", "cuBLAS"]  # fmt: skip
    assert text[2].endswith("b (the table's)")
    assert text[3].endswith("every plan failed")


@pytest.mark.parametrize("scheme", packed.SCHEMES)
def test_quantised_weights_to_measure(scheme: str) -> None:
    """Each scheme's are finite, of the size of a trained model's, and a plan can be tried for each number of rows."""
    cpu = torch.device("cpu")
    weight = packed.random_weight(packed.SCHEMES[scheme], [128], 256, cpu)
    assert 0.1 < weight.dequantize(torch.float32).std() * 256**0.5 < 10
    assert (
        packed.random_weight(packed.SCHEMES[scheme], [64, 64], 256, cpu, 3)[2]
        .dequantize(torch.float16)
        .isfinite()
        .all()
    )
    for tokens in (1, 2, 3, 16, 64):
        assert all(plan.tokens >= 16 or isinstance(plan, packed.Gemv) for plan in packed.plans(tokens))


@pytest.mark.parametrize("shape", [(4096, 4096), (6144, 4096), (24576, 4096), (4096, 12288), (96, 128)])
@pytest.mark.parametrize("tokens", [1, 16, 17, 64])
def test_plans_for_quads(shape: tuple[int, int], tokens: int) -> None:
    """No plan has more programs than steps, and large weights keep all processors busy."""
    outputs, inputs = shape
    found = packed.quad_plans(tokens, outputs, inputs, 132)
    assert bool(found) == (outputs > 96)
    assert len(set(found)) == len(found)
    for plan in found:
        assert isinstance(plan, packed.QuadTile)
        assert plan.tokens >= max(16, tokens)
        assert plan.splits * plan.depth * (plan.warps if plan.by_columns else 1) <= inputs
        assert outputs / plan.rows * plan.splits * plan.warps >= 4 * 132
    assert not packed.quad_plans(65, outputs, inputs, 132)


def test_the_best_tiles_together() -> None:
    entries = packed.moe_entries(True)
    us = {repr(entry): 100.0 - i for i, entry in enumerate(entries)}
    us[repr(entries[3])] = us[repr(entries[-2])] = 1.0
    us[repr(entries[0])] = 0.5  # one of another kind
    best = packed.together(entries, us)
    assert best.gate_up is entries[3].gate_up
    assert best.down is entries[-2].down
    assert packed.together(entries, {}) == entries[0]
    assert not any(isinstance(entry.gate_up, packed.ByColumns) for entry in packed.moe_entries(False))


def test_shares_of_the_memory_rate() -> None:
    figures = [Figure("cuBLAS", 1.0, 0.0), Figure("a", 30.0, 0.0), Figure("b", 20.0, 0.0), Figure("c", None, None)]
    lines = packed.shares([(Product("o", 1, 1), 4, 30_000_000, figures), (Product("o", 1, 1), 8, 1, figures[3:])])
    assert [line.split() for line in lines] == [["o", "4", "20.00us", "1500", "GB/s,", "50%", "b"]]


def test_operations_of_a_prompt() -> None:
    """A token sees itself and what precedes it."""
    pair = 2 * (2 * latents.RANK + latents.ROPE)
    assert latents.operations(1, 1, 1) == pair
    assert latents.operations(3, 2, 10) == 3 * (9 + 10) * pair


def test_what_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, said in ((["moe", "--model", "qwen3-8b"], "no experts"), (["linear", "--tp", "5"], "--tp")):
        with pytest.raises(ConfigError, match=said):
            main(arguments)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="GPU"):
        main(["linear"])
    with pytest.raises(ConfigError, match="GPU"):
        packed.main(["linear"])
    with pytest.raises(ConfigError, match="GPU"):
        latents.main([])
    with pytest.raises(ConfigError, match="no experts"):
        packed.main(["moe", "--model", "qwen3-8b"])
