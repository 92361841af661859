"""Keys, bounded queues, models from anywhere, ZMQ between processes."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from support.checkpoints import make_checkpoint
from support.served import Served, wait_for
from tandem.core.checkpoint import model_folder
from tandem.core.config import load_config

pytestmark = pytest.mark.e2e


def test_keys_and_bounded_queues_over_zmq(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    by_shm: Served = request.getfixturevalue("served")
    served = Served(
        tmp_path,
        "--set", "gateway.api_keys=[first-key, second-key]",
        "--set", "gateway.max_queued=4",
        "--set", "gateway.min_priority=-5",
        "--set", "pools.decode.max_running=1",
        "--set", "kv.transport=zmq",
        "--set", "log.format=json",
    )  # fmt: skip
    try:
        served.wait_ready()
        assert "first-key" not in served.text()
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "first-key2"}):
            for path in ("/v1/models", "/debug/requests/x"):
                answer = served.client.get(path, headers=headers)
                assert answer.status_code == 401
                assert answer.json()["error"]["type"] == "authentication_error"
        assert served.client.get("/livez").status_code == 200
        served.client.headers["authorization"] = "Bearer second-key"
        assert served.client.get("/v1/models").status_code == 200
        moved = served.metric("tandem_transfer_bytes_total", transport="zmq")
        long = served.complete(prompt=list(range(100, 2100)), max_tokens=20, temperature=0, return_token_ids=True)
        assert served.metric("tandem_transfer_bytes_total", transport="zmq") > moved
        again = served.complete(prompt=list(range(100, 2100)), max_tokens=20, temperature=0, return_token_ids=True)
        assert long["choices"][0]["token_ids"] == again["choices"][0]["token_ids"]

        # The same seed, the same tokens, whatever carried the KV.
        seeded = {"prompt": list(range(200, 1400)), "max_tokens": 40, "temperature": 1.0, "seed": 9, "ignore_eos": True}
        tokens = [s.complete(**seeded, return_token_ids=True)["choices"][0]["token_ids"] for s in (served, by_shm)]
        assert by_shm.metric("tandem_transfer_bytes_total", transport="shm") > 0
        assert tokens[0] == tokens[1]

        async def flood() -> list[httpx.Response]:
            async with httpx.AsyncClient(base_url=served.url, headers=served.client.headers, trust_env=False) as client:
                body = {"prompt": "x", "max_tokens": 200, "ignore_eos": True}
                return await asyncio.gather(*(client.post("/v1/completions", json=body, timeout=60) for _ in range(20)))

        answers = asyncio.run(flood())
        statuses = [answer.status_code for answer in answers]
        assert statuses.count(200) >= 4
        assert statuses.count(429) >= 1
        assert set(statuses) == {200, 429}
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        too_many = served.client.post("/v1/completions", json={"prompt": ["x"] * 5, "max_tokens": 1})
        assert too_many.status_code == 429
        served.wait_idle()
        check_that_the_urgent_overtake(served)
        served.wait_idle()
        assert "first-key" not in served.logs()
        assert "second-key" not in served.logs()
        records = [json.loads(line) for line in served.logs().splitlines()]
        assert any(record.get("request_id") == long["id"] for record in records)
        assert served.stop() == 0
    finally:
        served.kill()


def check_that_the_urgent_overtake(served: Served) -> None:
    """Of four places one runs and three wait: an urgent request takes the last one's, and goes before the others."""
    refused = served.client.post("/v1/completions", json={"prompt": "x", "priority": -6})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "priority"
    assert "-5" in refused.json()["error"]["message"]

    def complete(name: str, priority: int) -> httpx.Response:
        body = {"prompt": name, "max_tokens": 20, "ignore_eos": True, "priority": priority}
        return served.client.post("/v1/completions", json=body)

    with ThreadPoolExecutor(4) as pool:
        # It runs until its client leaves.
        running = {"prompt": "x", "max_tokens": 3900, "ignore_eos": True, "stream": True}
        with served.client.stream("POST", "/v1/completions", json=running) as stream:
            lines = stream.iter_lines()  # a client leaves with its last reference
            next(lines)
            waiting = []
            for name, priority in (("first", 3), ("last", 4), ("second", 3)):
                waiting.append(pool.submit(complete, name, priority))
                in_flight = 1 + len(waiting)
                wait_for(lambda n=in_flight: served.metric("tandem_requests_in_flight") == n, 20, f"{name} to wait")
            urgent = pool.submit(complete, "urgent", -5)
            displaced = waiting[1].result(60)
            assert not urgent.done()
        assert displaced.status_code == 429
        assert int(displaced.headers["retry-after"]) >= 1
        started_s = []
        for answered in (urgent, waiting[0], waiting[2]):
            answer = answered.result(60)
            assert answer.status_code == 200
            stages = served.client.get(f"/debug/requests/{answer.json()['id']}").json()["stages"]
            started_s += [stage["at"] for stage in stages if stage["stage"] == "decode.started"]
    assert len(started_s) == 3
    assert started_s == sorted(started_s)
    assert served.metric("tandem_displaced_total") == 1


def test_a_checkpoint_of_ones_own_with_dummy_weights_and_no_tokenizer(tmp_path: Path) -> None:
    folder = tmp_path / "tiny-llama"
    make_checkpoint("llama", folder)
    (folder / "model.safetensors").unlink()
    served = Served(
        tmp_path, "--set", f"model.path={folder}", "--set", "model.load=dummy", "--set", "pools.colocated={replicas: 2}",
        "--set", "kv.capacity=16MiB",
    )  # fmt: skip
    try:
        served.wait_ready()
        assert served.client.get("/v1/models").json()["data"][0]["id"] == "tiny-llama"
        answer = served.complete(prompt=[1, 2, 3], max_tokens=5, return_token_ids=True)
        assert len(answer["choices"][0]["token_ids"]) == 5
        refused = served.client.post("/v1/completions", json={"prompt": "text"})
        assert refused.status_code == 400
        assert "no tokenizer" in refused.json()["error"]["message"]
        assert served.stop() == 0
    finally:
        served.kill()


def test_sharded_checkpoints_and_a_worker_pool(tmp_path: Path) -> None:
    """Two of each, the demo model cut into shards: every worker takes part."""
    import safetensors.torch

    folder = tmp_path / "sharded"
    folder.mkdir()
    source = model_folder(load_config())
    for path in source.iterdir():
        if path.suffix in (".json", ".jinja"):
            (folder / path.name).write_bytes(path.read_bytes())
    tensors = safetensors.torch.load_file(source / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for shard in range(3):
        name = f"model-{shard + 1:05d}-of-00003.safetensors"
        part = {key: tensors[key] for key in names[shard::3]}
        safetensors.torch.save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    served = Served(
        tmp_path, "--set", f"model.path={folder}", "--set", "model.name=mine", "--set", "routing.policy=round_robin",
        "--set", "pools.prefill={replicas: 2}", "--set", "pools.decode={replicas: 2}", "--set", "routing.local_prefill=never",
    )  # fmt: skip
    try:
        served.wait_ready()

        def all_linked() -> bool:
            for i in range(8):
                served.complete(prompt=[100 * i + j for j in range(50)], max_tokens=2, model="mine")
            return all(
                served.metric("tandem_prompt_tokens_total", worker=f"prefill-{i}") > 0 for i in range(2)
            ) and all(served.metric("tandem_output_tokens_total", worker=f"decode-{i}") > 0 for i in range(2))

        wait_for(all_linked, 20, "every worker to take part")
        assert served.stop() == 0
    finally:
        served.kill()
