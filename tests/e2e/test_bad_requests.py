"""Two hundred hostile requests: each a 4xx that says why; neighbours say the same as ever; nobody restarts."""

from __future__ import annotations

import json
import random
import socket
import threading
from typing import Any

import pytest
from support.served import Served

pytestmark = pytest.mark.e2e

NEIGHBOUR = {"prompt": "def neighbour(", "max_tokens": 24, "temperature": 1.0, "seed": 99}


def wrong_bodies() -> list[tuple[str, bytes]]:
    """Path and body of each."""
    bodies: list[tuple[str, Any]] = []
    good = {"prompt": "x", "max_tokens": 4}
    wrong_values: dict[str, list[Any]] = {
        "prompt": [None, 5, 1.5, True, {}, [], [[]], [[], [1]], ["a", 1], [1, "a"], [-1], [4096], [2**31], [2**70], [1.5],
                   [[1], [4096]], [None], [[["a"]]], "", [""], "x" * 300_000, [1] * 4096, [1] * 5000],
        "max_tokens": [-1, 0, 10**6, 10**18, 10**400, "4", 1.5, [], {}, True, 4097],
        "n": [0, -1, 10**6, 129, "2", 1.5, [], 10**30],
        "temperature": [-0.1, 101, 1e308, "1", [], {}, True],
        "top_p": [0, -1, 1.1, "1", []],
        "top_k": [-2, 2**31, 1.5, "3"],
        "min_p": [-0.1, 1.1, "0"],
        "presence_penalty": [-2.1, 2.1, "0"],
        "frequency_penalty": [-2.1, 2.1, []],
        "repetition_penalty": [0, -1, 101, "1"],
        "logit_bias": [[], {"a": 1}, {"-1": 1}, {"4096": 1}, {"99999999999": 1}, {"1": 101}, {"1": "x"}, {"1.5": 1},
                       {str(i): 1 for i in range(2000)}],
        "logprobs": [-1, 21, 10**9, "1", 1.5],
        "stop": [5, "", [""], ["a"] * 17, ["a" * 257], "a" * 1000, [1], {}],
        "stop_token_ids": [[-1], [4096], ["a"], [1] * 129, 5],
        "seed": [2**63, -(2**63) - 1, 1.5, "1", []],
        "stream": ["true", 1, []],
        "stream_options": [{"include_usage": True}, 5],
        "echo": ["yes", 1],
        "best_of": [2, 0, "1"],
        "suffix": ["after"],
        "model": ["gpt-4", "../../etc/passwd", "x" * 300, 5, ""],
        "ignore_eos": ["no", 0],
        "return_token_ids": [1, "x"],
        "priority": [-1, 2**31, -(2**31), 10**30, "0", 1.5, True, [], {}],
        "cache_salt": ["x" * 129, 5, ["a"]],
        "return_hidden_states": [True, "/tmp/x", {"path": "/tmp/x"}],
        "prompt_cache_key": [5],
        "store": ["x"],
        "service_tier": [1],
        "safety_identifier": [{}],
        "user": ["x" * 2000, 5],
        "metadata": [{"a": 1}, []],
    }  # fmt: skip
    for field, values in wrong_values.items():
        bodies += [("/v1/completions", {**good, field: value}) for value in values]
    for field in ("kv_transfer_params", "prefill", "ticket", "children", "do_remote_decode", "remote_block_ids",
    "skip_tokens",
                  "request_id", "tools", "stop_ids", "sampling", "remote_host", "remote_port", "tp_size", "bootstrap_host",
                  "bootstrap_room", "data_parallel_rank", "lora_request", "multi_modal_data", "prompt_embeds", "guided_json", "prompt_logprobs", "max_token", "__class__"):  # fmt: skip
        bodies.append(("/v1/completions", {**good, field: {"do_remote_prefill": True}}))
    message = {"role": "user", "content": "x"}
    for messages in (
        None, [], "x", {}, [5], [{}], [{"role": "user"}], [{"content": "x"}], [{**message, "role": 5}],
        [{**message, "content": 5}], [{**message, "content": [{"type": "image_url", "image_url": "http://127.0.0.1/"}]}],
        [{**message, "tool_calls": []}], [message] * 5000, [{**message, "content": "x" * 300_000}],
    ):  # fmt: skip
        bodies.append(("/v1/chat/completions", {"messages": messages}))
    for extra in (
        {"top_logprobs": 2}, {"logprobs": 1}, {"logprobs": True, "top_logprobs": 21}, {"max_completion_tokens": -1},
        {"response_format": {"type": "json_object"}}, {"tools": [{"type": "function"}]}, {"max_tokens": 10**9},
        {"prompt": "x"}, {"functions": []},
    ):  # fmt: skip
        bodies.append(("/v1/chat/completions", {"messages": [message], **extra}))
    bodies += [
        ("/tokenize", {}), ("/tokenize", {"prompt": 5}), ("/tokenize", {"prompt": "x", "messages": [message]}),
        ("/detokenize", {}), ("/detokenize", {"tokens": [4096]}), ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": "x"}), ("/detokenize", {"tokens": [2**64]}),
    ]  # fmt: skip
    encoded = [(path, json.dumps(body).encode()) for path, body in bodies]
    for raw in (
        b"", b"{", b"[]", b"null", b"5", b'"x"', b"{'prompt': 'x'}", b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "x", "temperature": Infinity}', b'{"prompt": "\xff\xfe"}', b'{"prompt": "x"' + b" " * 1000,
        b'{"prompt": "x", "prompt": }', b"[" * 50_000, b'{"a":' * 50_000, b'{"prompt": "\\ud800"}', b"\x00" * 100,
        b"\x80\x04\x95pickle", b'{"prompt": "x", "n": ' + b"9" * 10_000 + b"}",
    ):  # fmt: skip
        encoded.append(("/v1/completions", raw))
    return encoded


def test_hostile_requests(served: Served) -> None:
    before = {name: served.worker(name).pid for name in ("prefill-0", "decode-0", "gateway-0")}
    golden = served.complete(**NEIGHBOUR)["choices"][0]["text"]
    stop = threading.Event()
    texts: list[str] = []

    def neighbours() -> None:
        while not stop.is_set():
            texts.append(served.complete(**NEIGHBOUR)["choices"][0]["text"])

    thread = threading.Thread(target=neighbours)
    thread.start()
    bodies = wrong_bodies()
    assert len(bodies) >= 200
    random.Random(0).shuffle(bodies)
    try:
        for path, body in bodies:
            answer = served.client.post(path, content=body)
            assert 400 <= answer.status_code < 500, (path, body[:200], answer.status_code, answer.text[:300])
            error = answer.json()["error"]
            assert len(error["message"]) > 5
            assert len(answer.text) < 5000, "an error does not repeat the request"
            assert error["type"] in ("invalid_request_error", "not_found_error")
    finally:
        stop.set()
        thread.join()
    assert len(texts) > 3
    assert set(texts) == {golden}
    assert {name: served.worker(name).pid for name in before} == before
    served.wait_idle()


def test_ten_megabytes(served: Served) -> None:
    answer = served.client.post("/v1/completions", json={"prompt": "x" * 10_000_000})
    assert answer.status_code == 413
    assert "gateway.max_body" in answer.json()["error"]["message"]

    def endless() -> Any:
        for _ in range(200):
            yield b"x" * 100_000

    answer = served.client.post("/v1/completions", content=endless())
    assert answer.status_code == 413


def test_paths_and_methods(served: Served) -> None:
    for method, path, status in (
        ("GET", "/v1/completions", 405), ("POST", "/v1/models", 405), ("GET", "/", 404), ("GET", "/../../etc/passwd",
        404), ("GET", "/debug/requests/nope", 404), ("DELETE", "/v1/chat/completions", 405), ("GET",
        "/v1/models/%2e%2e", 404),
    ):  # fmt: skip
        answer = served.client.request(method, path)
        assert answer.status_code == status, (method, path)
        assert answer.json()["error"]["message"]


def test_broken_connections(served: Served) -> None:
    """Half requests, nonsense and sudden ends leave no trace."""
    for data in (
        b"", b"GET", b"\x00\xff" * 500, b"POST /v1/completions HTTP/1.1\r\nContent-Length: 100\r\n\r\n{",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nZZZ\r\n",
        b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 20_000,
    ):  # fmt: skip
        with socket.create_connection(("127.0.0.1", served.port), timeout=5) as connection:
            try:
                connection.sendall(data)
            except OSError:
                continue
    assert served.client.get("/livez").status_code == 200
    served.wait_idle()
