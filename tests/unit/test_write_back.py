"""A first tier that takes what the prefix cache gives up, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.checkpoints import make_checkpoint
from support.offloading import POOLS, Slow, block_bytes, check, config_of, prompt_of, real, until_ready, value
from support.pair import Pair
from support.tiers import end
from tandem.core.config import Config
from tandem.kv_transfer.offload.build import start_host_tier
from tandem.kv_transfer.offload.stack import Write

FAMILIES = {"qwen3_moe": 20, "qwen3_mixed": 50}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("write_back")
    for family in FAMILIES:
        make_checkpoint(family, folder / family)
    return folder


def golden(folder: Path) -> list[list[int]]:
    pair = Pair(config_of(folder, 800, POOLS["together"]))
    outputs = pair.generate([prompt_of(number, 90) for number in range(4)], max_tokens=12)
    pair.close()
    return outputs


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_given_up_comes_back(folder: Path, tmp_path: Path, family: str, overlap: bool) -> None:
    folder = folder / family
    wanted, size = golden(folder), block_bytes(folder)
    tiers = [{"kind": "host", "capacity": 400 * (size + 256), "write": "write_back"}]
    keeper = start_host_tier(Config.model_validate({"offload": {"tiers": tiers}}).offload, size, tmp_path)
    assert keeper is not None
    pools = {"colocated": {"max_batched_tokens": 32}}
    pair = Pair(config_of(folder, FAMILIES[family], pools, tiers), overlap, tiers_of=real(tmp_path))
    until_ready(pair)
    for turn in range(3):
        for number in range(4):
            assert pair.generate([prompt_of(number, 90)], max_tokens=12) == [wanted[number]], (turn, number)
    assert value(pair.decode, "tandem_offload_loads_total", outcome="loaded") >= 4
    assert value(pair.decode, "tandem_offload_tokens_total") >= 4 * 40
    check(pair)
    pair.close()
    end(keeper)


def test_nothing_is_stored_sooner_and_nothing_waits(folder: Path) -> None:
    """As many as there are places while the tier is slow; the others are lost, and the places come back."""
    slow = Slow(config_of(folder / "qwen3_moe", 20, POOLS["together"]), 1.0, write=Write.BACK, num_spill=2)
    pair = slow.pair
    [tier] = slow.tiers.values()
    spill = pair.decode.offloader._stack.spill
    pair.submit(prompt_of(0, 90), max_tokens=2)
    slow.run()
    assert tier.stats().stored == 0
    ticket = pair.submit(prompt_of(1, 90), max_tokens=2)
    while not pair.outputs[ticket].finish:
        assert pair.turn(), "it does not wait"
    assert spill.num_free == 0
    slow.run()
    assert (tier.stats().stored, spill.num_free) == (2, 2)
    # The end of a prefix goes first, and its beginning stays: of what is left, nothing is stored twice.
    pair.submit(prompt_of(2, 90), max_tokens=2)
    slow.run()
    pair.submit(prompt_of(0, 90), max_tokens=2)
    slow.run()
    assert len(tier._content) == tier.stats().num_used == tier.stats().stored
    check(pair)
    pair.close()


def test_other_tenants_never_get_it(folder: Path) -> None:
    slow = Slow(config_of(folder / "qwen3_moe", 20, POOLS["together"]), 0.0, write=Write.BACK, num_spill=20)
    for salt in ("a", "b", "c", "d"):
        slow.pair.submit(prompt_of(1, 90), max_tokens=2, salt=salt)
        slow.run()
    [tier] = slow.tiers.values()
    assert tier.stats().stored > 0
    assert value(slow.pair.decode, "tandem_offload_tokens_total") == 0
    check(slow.pair)
    slow.pair.close()
