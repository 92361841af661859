"""Workers that differ: what cannot be read is refused in the handshake, by name and with both values, and answered
all the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
from support.checkpoints import make_checkpoint
from support.gateway import wait_for
from support.load import Body, Tokens, ask_all, body, check
from support.processes import Processes

pytestmark = pytest.mark.chaos

Golden = Callable[[list[Body]], list[Tokens]]


class Row(NamedTuple):
    """What a prefill worker has of its own, and what comes of it."""

    own: dict[str, dict[str, Any]]
    refused: tuple[str, ...] = ()
    """Words of the refusal: the field, both sides and both values; empty: it is read from."""


# Against a decode worker with the defaults. "{tiny}" is another model's folder.
TABLE = {
    "the same": Row({}),
    "longer blocks": Row({"kv": {"block_tokens": 32}}),
    "shorter blocks": Row({"kv": {"block_tokens": 8}}),
    "odd blocks": Row({"kv": {"block_tokens": 12}}),
    "layer groups": Row({"kv": {"layer_groups": 3}}),
    "dtype": Row({"model": {"dtype": "float16"}}, ("model", "prefill-5#1", "serves", "decode-0#1")),
    "revision": Row({"model": {"load": "dummy"}}, ("model", "prefill-6#1", "serves", "decode-0#1")),
    "model": Row({"model": {"path": "{tiny}", "max_model_len": 256}}, ("model", "prefill-7#1", "serves", "decode-0#1")),
    "pool, lease and chunks": Row(
        {"kv": {"capacity": "12MiB", "lease_s": 5, "prefix_cache": False}, "pools": {"prefill": {"max_running": 3}, "decode": {}}}
    ),
}  # fmt: skip
NAMES = {row: f"prefill-{index}" for index, row in enumerate(TABLE)}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    tiny = tmp_path_factory.mktemp("tiny")
    make_checkpoint("qwen3_moe", tiny)
    workers: dict[str, dict[str, dict[str, Any]]] = {"decode-0": {}}
    for row, name in NAMES.items():
        workers[name] = {
            section: {key: value.format(tiny=tiny) if isinstance(value, str) else value for key, value in keys.items()}
            for section, keys in TABLE[row].own.items()
        }
    config = {"model": {"max_model_len": 1024}, "kv": {"capacity": "48MiB"}, "routing": {"local_prefill": "never"}}
    with Processes(tmp_path_factory.mktemp("mismatches"), config, workers) as cluster:
        yield cluster


@pytest.mark.parametrize("row", list(TABLE))
def test_a_pair(cluster: Processes, golden: Golden, row: str) -> None:
    name = NAMES[row]
    cluster.announce("decode-0", name)
    peer = f"{name}#1"
    if TABLE[row].refused:

        def refusal() -> str:
            lines = cluster.all["decode-0"].log.read_text().splitlines()
            return next((line for line in lines if "cannot read from" in line and peer in line), "")

        text = wait_for(refusal, 30, f"a refusal of {row}")
        assert all(word in text for word in TABLE[row].refused), text
    else:
        log = cluster.all["decode-0"].log
        wait_for(lambda: f"KV of {peer} comes by" in log.read_text(), 30, f"{row} to be read from")
        cluster.wait_routable()
    bytes_before = cluster.metric("tandem_transfer_bytes_total", peer=name)
    requests = [body(i, max_tokens=8) for i in range(6)]
    check(ask_all(cluster.url, requests), golden(requests))
    moved = cluster.metric("tandem_transfer_bytes_total", peer=name) - bytes_before
    assert (moved > 0) == (not TABLE[row].refused)
    cluster.wait_idle(30)
