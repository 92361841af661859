"""Errors, hashes, ids, clock, messages, metrics, logs."""

from __future__ import annotations

import logging
import pickle
import random
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from tandem.core import errors
from tandem.core.bounds import MAX_CHILDREN
from tandem.core.clock import ManualClock, SystemClock
from tandem.core.hashing import block_hashes, root_hash
from tandem.core.ids import incarnation_of, new_request_id, peer_id, worker_of
from tandem.core.log import RateLimited, RequestLog, configure_logging, logger
from tandem.core.messages import (
    Child,
    ChildUpdate,
    Generate,
    Prefill,
    Sampling,
    Stopping,
    Update,
    decode,
    encode,
)
from tandem.core.metrics import GatewayMetrics, WorkerMetrics, merge, render
from tandem.core.randomness import WORD, child_seed, mix64, stream_key

ERRORS = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.TandemError)]


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_survive_pickling(kind: type[errors.TandemError]) -> None:
    error = kind("found this, expected that", fix="do so", status=418, history=("a", "b"))
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert (copy.message, copy.fix, copy.status) == ("found this, expected that", "do so", 418)
    assert str(copy) == str(error)


def test_the_tree_says_what_may_be_tried_again() -> None:
    assert errors.CapacityError("x").retryable
    assert errors.WorkerError("x").retryable
    assert not errors.RequestError("x").retryable
    assert errors.RequestError("x").status == 400


def test_hashes_do_not_depend_on_the_process() -> None:
    code = (
        "from tandem.core.hashing import *\n"
        "print(b''.join(block_hashes(range(70), 16, root_hash('model', 'tenant'))).hex())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("0", "1", "random")
    }
    expected = b"".join(block_hashes(range(70), 16, root_hash("model", "tenant"))).hex()
    assert outputs == {expected + "\n"}
    # A changed constant would make every stored block unfindable.
    assert expected[:32] == "41b038afcf40484782b31944e0a12cd1"


@given(st.lists(st.integers(0, 2**32 - 1), max_size=80), st.integers(1, 20), st.integers(0, 4))
def test_hashes_chain(tokens: list[int], block_tokens: int, start: int) -> None:
    root = root_hash("m")
    keys = block_hashes(tokens, block_tokens, root)
    assert len(keys) == len(tokens) // block_tokens
    assert len(set(keys)) == len(keys)
    start = min(start, len(keys))
    parent = keys[start - 1] if start else root
    assert block_hashes(tokens, block_tokens, parent, start) == keys[start:]


def test_salt_and_model_separate_tenants() -> None:
    roots = {root_hash(model, salt) for model in ("a", "b", "ab") for salt in ("", "a", "b")}
    assert len(roots) == 9


def test_ids() -> None:
    assert worker_of(peer_id("prefill-0", 3)) == "prefill-0"
    assert incarnation_of(peer_id("prefill-0", 3)) == 3
    assert len({new_request_id("cmpl") for _ in range(1000)}) == 1000


def test_clocks() -> None:
    clock = ManualClock()
    clock.advance(2.5)
    assert clock.monotonic_s() == clock.wall_s() == 2.5
    with pytest.raises(ValueError, match="does not go back"):
        clock.advance(-1)
    assert SystemClock().monotonic_s() <= SystemClock().monotonic_s()
    clock.advance_to(0.1 + 0.2 + 1e9)
    assert clock.monotonic_s() == 0.1 + 0.2 + 1e9
    with pytest.raises(ValueError, match="does not go back"):
        clock.advance_to(1.0)


def generate(**changes: object) -> Generate:
    fields = {
        "ticket": 1, "request_id": "cmpl-1", "tokens": [1, 2, 3], "num_prompt_tokens": 3,
        "children": [Child(0, 5)], "sampling": Sampling(temperature=0.5, logit_bias={3: -1.0}),
        "stopping": Stopping(7, [2]),
    }  # fmt: skip
    return Generate(**(fields | changes))  # type: ignore[arg-type]


def test_messages_travel() -> None:
    assert decode(encode(generate())) == generate()
    update = Update(children=[ChildUpdate(1, 0, [5])])
    assert decode(memoryview(encode(update))) == update


@pytest.mark.parametrize(
    "message",
    [
        generate(tokens=[]),
        generate(tokens=[-1]),
        generate(tokens=[1 << 40]),
        generate(ticket=-1),
        generate(request_id="x" * 1000),
        generate(children=[Child(0, 1)] * (MAX_CHILDREN + 1)),
        generate(children=[Child(0, -1)]),
        generate(sampling=Sampling(temperature=float("nan"))),
        generate(sampling=Sampling(top_p=0.0)),
        generate(sampling=Sampling(top_p=2.0)),
        generate(stopping=Stopping(0)),
        generate(prompt_logprobs=10**6),
        Prefill(1, "r", [1], 1, -16, [Child(0, 1)], Sampling()),
    ],
)
def test_bounds_hold_at_the_receiver(message: Generate) -> None:
    with pytest.raises(msgspec.ValidationError):
        decode(encode(message))


def test_mutated_frames_never_get_through_half_checked() -> None:
    frame = encode(generate())
    random_bits = random.Random(0)
    survived = 0
    for _ in range(20_000):
        mutated = bytearray(frame)
        for _ in range(random_bits.randrange(1, 4)):
            mutated[random_bits.randrange(len(mutated))] = random_bits.randrange(256)
        try:
            message = decode(bytes(mutated[: random_bits.randrange(1, len(mutated) + 1)]))
        except msgspec.DecodeError:
            continue
        survived += 1
        assert decode(encode(message)) == message or message != message
    assert survived < 10_000


def test_deeply_nested_frames_are_refused() -> None:
    for byte in (b"\x91", b"\x81\xa4type"):
        with pytest.raises(msgspec.DecodeError):
            decode(byte * 100_000)


def test_metrics_of_several_processes_are_one_exposition() -> None:
    texts = {}
    for worker in ("prefill-0", "decode-0"):
        metrics = WorkerMetrics(CollectorRegistry())
        metrics.blocks.labels("free").set(7)
        metrics.load_failures.labels("expired").inc()
        texts[worker] = render(metrics.registry)
    texts["gateway-0"] = render(GatewayMetrics(CollectorRegistry()).registry)
    merged = merge(texts)
    families = {family.name: family for family in text_string_to_metric_families(merged)}
    workers = {sample.labels["worker"] for sample in families["tandem_kv_blocks"].samples}
    assert workers == {"prefill-0", "decode-0"}
    assert merged.count("# TYPE tandem_kv_blocks gauge") == 1
    assert 'tandem_kv_load_failures_total{reason="expired",worker="decode-0"} 1.0' in merged


def test_logs_name_process_and_request(tmp_path: Path) -> None:
    file = tmp_path / "logs" / "decode.log"
    before = list(logger.handlers)
    try:
        configure_logging("decode-0#1", "INFO", "text", file)
        RequestLog("cmpl-1").info("prompt of %d tokens", 5)
        RequestLog("cmpl-1").debug("not written")
        limited = RateLimited(period_s=1000)
        for _ in range(50):
            limited.warning("key", "noise")
        configure_logging("decode-0#1", "INFO", "json", tmp_path / "json.log")
        RequestLog("cmpl-2").info("done")
    finally:
        for handler in logger.handlers:
            handler.close()
        logger.handlers = before
        logger.propagate = True
        logger.setLevel(logging.NOTSET)
    lines = file.read_text().splitlines()
    assert lines[0].endswith("INFO decode-0#1 cmpl-1 prompt of 5 tokens")
    assert len(lines) == 2
    record = msgspec.json.decode((tmp_path / "json.log").read_bytes())
    assert record["request_id"] == "cmpl-2"
    assert record["process"] == "decode-0#1"


def test_randomness_spreads() -> None:
    words = [mix64(i) for i in range(10_000)]
    assert len(set(words)) == 10_000
    assert all(0 <= word < WORD for word in words)
    ones = sum(bin(word).count("1") for word in words) / 10_000
    assert 31.8 < ones < 32.2
    assert len({stream_key(seed, position) for seed in range(100) for position in range(100)}) == 10_000
    assert child_seed(7, 0) == 7
    assert len({child_seed(7, index) for index in range(100)}) == 100
    assert all(0 <= child_seed((1 << 63) - 1, index) < 1 << 63 for index in range(100))
