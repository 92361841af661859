"""A gateway as its clients see it: HTTP, and what tests want to know of a cluster through it."""

from __future__ import annotations

import contextlib
import random
import re
import socket
import time
from collections.abc import Callable
from typing import Any

import httpx

from .patience import stretched


def free_port() -> int:
    """A port that nobody listens on. Not of those that the system gives to whoever wants any, nor of Ray's workers':
    it would be somebody's before the gateway has started."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def wait_for(condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """Poll until ``condition`` gives something true, and return that; ``timeout_s`` is for an idle machine."""
    started_s = time.monotonic()
    while True:
        value = condition()
        if value:
            return value
        waited_s = time.monotonic() - started_s
        assert waited_s < stretched(timeout_s), f"{what}: not within {waited_s:.0f} s"
        time.sleep(0.05)


_SILENT = re.compile(r'^tandem_worker_up\{worker="([^"]*)"\} 0', re.MULTILINE)


class Gateway:
    """The gateway that listens on a port of this host."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self.port = port
        self.url = f"http://{host}:{port}"
        self.client = httpx.Client(base_url=self.url, timeout=60, trust_env=False)
        self._silent: set[str] = set()
        """Workers that did not give their metrics when they were last asked."""

    def complete(self, **body: Any) -> dict[str, Any]:
        """POST /v1/completions; must succeed."""
        answer = self.client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def metric(self, name: str, **labels: str) -> float:
        """Sum of a metric's samples that have these labels."""
        total = 0.0
        for line in self._metrics().splitlines():
            match = re.fullmatch(rf"{name}(?:\{{(.*)\}})? (\S+)", line)
            if match:
                found = dict(re.findall(r'(\w+)="([^"]*)"', match[1] or ""))
                if all(found.get(key) == value for key, value in labels.items()):
                    total += float(match[2])
        return total

    def _metrics(self) -> str:
        """All workers' metrics, but of those who stand still: who was merely too busy to answer within a gateway's second
        is asked again, once in a row."""
        text = self.client.get("/metrics").text
        silent = set(_SILENT.findall(text))
        if silent - self._silent:
            text = self.client.get("/metrics").text
        self._silent = silent
        return text

    def stages(self, request_id: str) -> list[str]:
        """What has happened to a request so far."""
        answer = self.client.get(f"/debug/requests/{request_id}")
        return [stage["stage"] for stage in answer.json()["stages"]] if answer.status_code == 200 else []

    def wait_idle(self, timeout_s: float = 10) -> None:
        """Until no request, block or lease is left on either side."""

        def idle() -> bool:
            return (
                self.metric("tandem_kv_blocks", state="used") == 0
                and self.metric("tandem_leases") == 0
                and self.metric("tandem_requests_in_flight") == 0
            )

        wait_for(idle, timeout_s, "blocks and leases back at zero")

    def wait_routable(self, timeout_s: float = 60) -> None:
        """Until prefill and decode serve together."""

        def routable() -> bool:
            try:
                return self.client.get("/readyz").status_code == 200
            except httpx.HTTPError:
                return False

        wait_for(routable, timeout_s, "/readyz")
