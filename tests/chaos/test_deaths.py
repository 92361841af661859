"""SIGKILL of either worker in each state of a request: the very tokens of an undisturbed run, and the worker is back."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest
from support.served import Served, wait_for

pytestmark = pytest.mark.chaos

# Small chunks and a long prompt: every state lasts long enough to be hit.
SETTINGS = ("--set", "pools.prefill={max_batched_tokens: 64}", "--set", "routing.local_prefill=never")
PROMPT = [(17 * i) % 4000 + 5 for i in range(2500)]
BODY: dict[str, Any] = {
    "prompt": PROMPT, "max_tokens": 120, "temperature": 1.0, "seed": 1234, "ignore_eos": True, "return_token_ids": True,
    "cache_salt": "",
}  # fmt: skip


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("chaos"), *SETTINGS)
    try:
        served.wait_ready()
        yield served
        assert served.stop() == 0
    finally:
        served.kill()


@pytest.fixture(scope="module")
def golden(served: Served) -> list[int]:
    return list(served.complete(**BODY)["choices"][0]["token_ids"])


class Streamed:
    """A request that is streamed on a thread."""

    def __init__(self, served: Served, **changes: Any) -> None:
        self.tokens: list[int] = []
        self.error = ""
        self.request_id = ""
        self._served = served
        self._body = {**BODY, **changes, "stream": True}
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._stream()
        except httpx.HTTPError as error:
            self.error = f"{type(error).__name__}: {error}"

    def _stream(self) -> None:
        with httpx.Client(base_url=self._served.url, timeout=120, trust_env=False, verify=False) as client:
            with client.stream("POST", "/v1/completions", json=self._body) as stream:
                self.request_id = stream.headers.get("x-request-id", "")
                for line in stream.iter_lines():
                    if line.startswith("data: {"):
                        event = json.loads(line[6:])
                        if "error" in event:
                            self.error = event["error"]["message"]
                            return
                        self.tokens.extend(event["choices"][0]["token_ids"])

    def stage(self, name: str) -> None:
        """Wait until the request has reached a stage."""
        try:
            wait_for(lambda: self.request_id and name in self._served.stages(self.request_id), 30, name)
        except AssertionError:
            timeline = self._served.client.get(f"/debug/requests/{self.request_id}").text
            raise AssertionError(f"{name} was not reached: {timeline}\n{self._served.logs()[-5000:]}") from None

    def result(self) -> list[int]:
        self._thread.join(timeout=120)
        assert not self._thread.is_alive(), "the stream never ended"
        assert self.error == ""
        return self.tokens


def fresh(index: int) -> dict[str, Any]:
    """A salt of its own: nothing is found in a prefix cache, so that every state is passed through."""
    return {"cache_salt": f"{index}-{time.monotonic_ns()}"}


STATES = ["queued", "prefilling", "transferring", "decoding"]


def reach(served: Served, request: Streamed, state: str) -> None:
    """Wait until the request is in the state."""
    match state:
        case "queued":
            request.stage("decode.handoff")
        case "prefilling":
            request.stage("prefill.started")
        case "transferring":
            request.stage("transfer.started")
        case "decoding":
            wait_for(lambda: len(request.tokens) > 10, 30, "ten tokens")


def wait_back(served: Served, name: str, victim: psutil.Process) -> None:
    """Until a worker that was killed is back. The request may have ended before anybody noticed the death."""
    wait_for(lambda: served.worker(name).pid != victim.pid, 60, "the worker to be back")
    served.wait_routable()


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("worker", ["prefill-0", "decode-0"])
def test_a_killed_worker_costs_time_not_tokens(served: Served, golden: list[int], worker: str, state: str) -> None:
    served.wait_routable()
    victim = served.worker(worker)
    if state == "queued":
        # A stopped prefill worker takes nothing in: the request waits.
        served.worker("prefill-0").suspend()
    request = Streamed(served, **fresh(0))
    reach(served, request, state)
    victim.kill()
    if state == "queued" and worker == "decode-0":
        served.worker("prefill-0").resume()
    assert request.result() == golden
    wait_back(served, worker, victim)
    served.wait_idle()
    assert served.complete(**BODY)["choices"][0]["token_ids"] == golden


def test_several_outputs_survive(served: Served) -> None:
    served.wait_routable()
    body = {**BODY, "n": 3, "max_tokens": 80, **fresh(1)}
    want = [choice["token_ids"] for choice in served.complete(**body)["choices"]]
    done: list[list[list[int]]] = []
    thread = threading.Thread(
        target=lambda: done.append([c["token_ids"] for c in served.complete(**{**body, **fresh(2)})["choices"]])
    )
    before = served.metric("tandem_output_tokens_total", worker="decode-0")
    thread.start()
    wait_for(lambda: served.metric("tandem_output_tokens_total", worker="decode-0") > before + 20, 30, "tokens")
    victim = served.worker("decode-0")
    victim.kill()
    thread.join(timeout=120)
    assert done == [want]
    wait_back(served, "decode-0", victim)
    served.wait_idle()


def test_stop_strings_and_logprobs_survive(served: Served) -> None:
    served.wait_routable()
    body = {"prompt": "def main(", "max_tokens": 400, "temperature": 1.0, "seed": 5, "logprobs": 2, "ignore_eos": True,
            "stop": ["\n\n\n\n\n\n"]}  # fmt: skip
    want = served.complete(**body)["choices"][0]
    done: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: done.append(served.complete(**body)["choices"][0]))
    before = served.metric("tandem_output_tokens_total", worker="decode-0")
    thread.start()
    wait_for(lambda: served.metric("tandem_output_tokens_total", worker="decode-0") > before + 5, 30, "tokens")
    victim = served.worker("decode-0")
    victim.kill()
    thread.join(timeout=120)
    assert done[0]["text"] == want["text"]
    assert done[0]["finish_reason"] == want["finish_reason"]
    assert done[0]["logprobs"]["tokens"] == want["logprobs"]["tokens"]
    for a, b in zip(done[0]["logprobs"]["token_logprobs"], want["logprobs"]["token_logprobs"], strict=True):
        assert abs(a - b) < 1e-4
    wait_back(served, "decode-0", victim)


def test_both_die(served: Served, golden: list[int]) -> None:
    served.wait_routable()
    request = Streamed(served, **fresh(3))
    reach(served, request, "transferring")
    victims = {name: served.worker(name) for name in ("prefill-0", "decode-0")}
    for victim in victims.values():
        victim.kill()
    assert request.result() == golden
    for name, victim in victims.items():
        wait_back(served, name, victim)
    served.wait_idle()


def test_the_gateway_dies_and_comes_back(served: Served, golden: list[int]) -> None:
    """Its own connections are lost, cleanly; what it had asked for is stopped; the next request is served."""
    served.wait_routable()
    gateway = served.worker("gateway-0")
    # As many tokens as fit: a stream of few may be over before the gateway is.
    request = Streamed(served, **fresh(4), max_tokens=1500)
    reach(served, request, "decoding")
    gateway.kill()
    wait_for(lambda: request.error, 30, "the stream to break")
    assert len(request.tokens) < 1500
    served.wait_routable()
    served.wait_idle()
    assert served.complete(**BODY)["choices"][0]["token_ids"] == golden


def test_under_load(served: Served) -> None:
    """Ten requests at a time, kills a second or so apart: all end with the tokens that they have undisturbed."""
    served.wait_routable()
    bodies = [
        {"prompt": [(31 * i + j) % 4000 + 5 for j in range(300)], "max_tokens": 60, "temperature": 1.0, "seed": i,
         "ignore_eos": True, "return_token_ids": True}
        for i in range(40)
    ]  # fmt: skip
    want = [served.complete(**body)["choices"][0]["token_ids"] for body in bodies]
    results: list[tuple[int, list[int]]] = []
    numbers = itertools.count()
    over = threading.Event()

    def client() -> None:
        while not over.is_set():
            index = next(numbers) % 40
            answer = served.complete(**bodies[index], cache_salt=str(time.monotonic_ns()))
            results.append((index, answer["choices"][0]["token_ids"]))

    threads = [threading.Thread(target=client) for _ in range(10)]
    for thread in threads:
        thread.start()
    for name in ("prefill-0", "decode-0", "decode-0", "prefill-0"):
        before = len(results)
        time.sleep(1.0)
        wait_for(lambda before=before: len(results) > before + 10, 60, "answers")
        served.worker(name).kill()
    over.set()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    assert len(results) > 40
    for index, tokens in results:
        assert tokens == want[index], index
    served.wait_routable()
    served.wait_idle()
    assert served.metric("tandem_replays_total") > 0
