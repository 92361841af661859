"""A served cluster as its operator sees it: one port for health and metrics, logs that tell of requests and of no secret."""

from __future__ import annotations

import json
import os
import re
import ssl
import subprocess
from pathlib import Path

import grpc
import httpx
import psutil
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.certificates import self_signed
from support.served import TANDEM, Served, wait_for

pytestmark = pytest.mark.e2e

API_KEY = "sk-users-4c1f90aa17"
ADMIN_KEY = "sk-operators-77e0b1d3c2"


def test_health_logs_and_secrets_of_a_cluster_with_keys_and_tls(tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path)
    config = tmp_path / "my.yaml"
    gateway = {"api_keys": [API_KEY], "admin_keys": [ADMIN_KEY], "tls_cert": str(certificate), "tls_key": str(key)}
    tree = {"gateway": gateway, "log": {"format": "json", "level": "DEBUG"}, "pools": {"decode": {}, "prefill": {}}}
    config.write_text(yaml.safe_dump(tree))
    served = Served(tmp_path, str(config))
    try:
        served.wait_ready()
        served.client.close()
        served.url = served.url.replace("http://", "https://")
        trust = ssl.create_default_context(cafile=str(certificate))
        served.client = httpx.Client(base_url=served.url, verify=trust, timeout=60, trust_env=False)
        assert f"{served.url}/v1" in served.text()
        assert served.client.get("/v1/models").status_code == 401
        served.client.headers["authorization"] = f"Bearer {API_KEY}"
        assert served.client.post("/admin/kv/clear", json={}).status_code == 401
        assert served.client.post("/admin/kv/clear", json={}, headers=_bearer(ADMIN_KEY)).status_code == 200
        assert served.client.get("/v1/models", headers=_bearer(ADMIN_KEY)).status_code == 401
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://127.0.0.1:{served.port}/livez", trust_env=False, timeout=20)
        request_id = served.complete(prompt=list(range(100, 900)), max_tokens=8, temperature=0)["id"]

        rows = _status(served)
        (url,) = {row["supervisor"] for row in rows}
        assert url.startswith("http://127.0.0.1:")  # as the gateway
        before = {name: served.worker(name).pid for name in ("prefill-0", "decode-0", "gateway-0")}
        with httpx.Client(base_url=url, trust_env=False) as http:
            _check_one_dead_rank(served, http, before)
        _check_logs(served, request_id)
        _check_secrets(served, key.read_text())
        assert served.stop() == 0, served.text()
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"{url}/livez", trust_env=False, timeout=20)
    finally:
        served.kill()


def _check_one_dead_rank(served: Served, http: httpx.Client, before: dict[str, int]) -> None:
    """It is told, and started again alone."""
    assert [http.get(path).status_code for path in ("/livez", "/readyz", "/startupz")] == [200, 200, 200]
    psutil.Process(before["decode-0"]).kill()
    told = wait_for(lambda: http.get("/readyz").json()["not_ready"], 30, "the supervisor to notice")
    assert list(told) == ["decode-0"]
    assert http.get("/livez").status_code == http.get("/startupz").status_code == 200
    wait_for(lambda: http.get("/readyz").status_code == 200, 90, "decode-0's next life")
    after = {name: served.worker(name).pid for name in before}
    assert {name for name in before if before[name] != after[name]} == {"decode-0"}
    assert {row["worker"]: row["restarts"] for row in _status(served)} == dict.fromkeys(before, 0) | {"decode-0": 1}

    metrics = http.get("/metrics").text
    for worker in before:
        place = f'pool="{worker[:-2]}",rank="0",worker="{worker}"'
        assert f"tandem_rank_ready{{{place}}} 1.0" in metrics
        (stalled_s,) = re.findall(rf"tandem_rank_stalled_seconds\{{{re.escape(place)}\}} (\S+)", metrics)
        assert float(stalled_s) < 10  # it may be in the middle of a turn
        assert f"tandem_rank_restarts{{{place}}} {float(worker == 'decode-0')}" in metrics
    assert 'tandem_sequences_running{pool="prefill",rank="0",worker="prefill-0"}' in metrics
    assert 'tandem_requests_in_flight{pool="gateway",rank="0",worker="gateway-0"} 0.0' in metrics
    with grpc.insecure_channel(str(http.base_url.netloc, "ascii")) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", *before):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=20)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


def _check_logs(served: Served, request_id: str) -> None:
    """One JSON object a record, and the request can be followed through the processes."""
    records = [json.loads(line) for line in served.logs().splitlines()]
    assert {record["process"].partition("-")[0] for record in records} >= {"prefill", "decode", "gateway", "supervisor"}
    told = {record["process"] for record in records if record.get("request_id") == request_id}
    assert any(process.startswith("prefill-0") for process in told)


def _check_secrets(served: Served, private_key: str) -> None:
    """None in any log, Ray's included, nor where every user of the host can see it."""
    notes = served.home / "tandem"
    (control,) = notes.glob("logs/*/control.json")
    ray = notes / "local-ray.json"
    secrets = {API_KEY, ADMIN_KEY, json.loads(control.read_text())["token"], json.loads(ray.read_text())["token"]}
    secrets |= {line for line in private_key.splitlines() if not line.startswith("---")}
    texts = {"output": served.text()}
    processes = served.tree()
    logs = set(notes.rglob("*.log"))
    for process in processes:
        texts[f"ps of {process.pid}"] = " ".join(process.cmdline())
        logs |= {Path(file.path) for file in process.open_files() if "/logs/" in file.path}
    for folder in {log.parent for log in logs}:
        texts |= {str(path): path.read_text(errors="replace") for path in folder.iterdir() if path.is_file()}
    del texts[str(control)]
    assert len(texts) > 10
    assert any("raylet" in name for name in texts)
    assert [name for name, text in texts.items() if any(secret in text for secret in secrets)] == []
    for note in (control, ray):
        assert note.stat().st_mode & 0o077 == 0


def _bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def _status(served: Served) -> list[dict[str, object]]:
    environment = {**os.environ, "XDG_CACHE_HOME": str(served.home)}
    done = subprocess.run([TANDEM, "status", "--json"], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]
