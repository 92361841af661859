"""What each rank of a group holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.sharded import FAMILIES, make_checkpoints
from tandem.core.errors import ConfigError
from tandem.engine.models.decoder import Decoder
from tandem.engine.models.names import destinations, elsewhere
from tandem.engine.models.shard import first_kv_head, local_kv_heads, shard, vocabulary_rows
from tandem.engine.models.spec import ModelSpec, parse_spec, read_spec
from tandem.engine.tensor_parallel import Alone, TorchGroup
from tandem.engine.weights import fill_dummy, load_weights
from tandem.kernels.oracle import REFERENCE

CPU = torch.device("cpu")
BASE: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"], "vocab_size": 10, "hidden_size": 8, "intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 12, "num_key_value_heads": 6, "head_dim": 2, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64, "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip


def spec_of(**changes: Any) -> ModelSpec:
    return parse_spec({**BASE, **changes}, {})


class Rank(Alone):
    """A rank of a group whose sums nobody asks for."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size


def model_of(folder: Path, rank: int = 0, size: int = 1) -> Decoder:
    return Decoder(read_spec(folder), 64, torch.float32, CPU, REFERENCE, group=Rank(rank, size))


@pytest.mark.parametrize(
    ("size", "changes", "message"),
    [
        (5, {}, "attention heads: 12 cannot be divided among 5 ranks, expected a multiple of 5"),
        (4, {}, "6 key and value heads can be neither divided among 4 ranks nor held by equally many ranks"),
        (3, {"intermediate_size": 25}, "the inner size of an expert: 25 cannot be divided among 3 ranks"),
        (
            3,
            {"intermediate_size": 25, "architectures": ["LlamaForCausalLM"]},
            "the inner size of the feed-forward part: 25 cannot be divided among 3 ranks",
        ),
    ],
)
def test_what_does_not_divide_is_refused(size: int, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        shard(spec_of(**changes), size)
    assert "a number of ranks that" in caught.value.fix


def test_a_share() -> None:
    spec = spec_of()
    assert shard(spec, 1) is spec
    third = shard(spec, 3)
    assert (third.num_heads, third.num_kv_heads, third.inner, third.hidden) == (4, 2, 8, 8)
    assert third.moe is not None
    assert third.moe.inner == 8
    # More ranks than key and value heads: neighbours share one, that of their query heads.
    assert [local_kv_heads(spec, size) for size in (1, 2, 3, 6, 12)] == [6, 3, 2, 1, 1]
    assert [first_kv_head(spec, rank, 12) for rank in range(12)] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    # Ten rows on six ranks: two each, and one rank has none.
    assert [list(vocabulary_rows(spec, rank, 6)) for rank in range(6)] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], []]


def test_ranks_hold_parts_of_one_model(tmp_path: Path) -> None:
    """Read from a checkpoint or made up, each rank's tensors are what the whole model has there."""
    make_checkpoints(tmp_path)
    for family in FAMILIES:
        folder = tmp_path / family
        for fill in (lambda model, folder=folder: load_weights(model, folder), lambda model: fill_dummy(model, 7)):
            whole = model_of(folder)
            fill(whole)
            places = destinations(whole)
            assert all(place.is_whole for place in places.values())
            for rank in range(4):
                part = model_of(folder, rank, 4)
                fill(part)
                assert destinations(part).keys() == places.keys() - elsewhere(part)
                for name, place in destinations(part).items():
                    assert place.shape == places[name].shape, name
                    all_of_it = places[name].tensor
                    if place.convert is None:
                        assert place.shape == all_of_it.shape, name
                        assert torch.equal(place.tensor, place.part_of(all_of_it)), name
                        continue
                    # It lies otherwise than published: a fourth of the dimension that is cut.
                    [dim] = [d for d, size in enumerate(place.tensor.shape) if size < all_of_it.shape[d]]
                    assert torch.equal(place.tensor, all_of_it.chunk(4, dim)[rank]), name


def test_a_rendezvous_is_a_file_or_an_address() -> None:
    with pytest.raises(ConfigError, match="expected an address that begins with file:// or tcp://"):
        TorchGroup(0, 2, "/tmp/somewhere", CPU)
