"""What tests of disturbed clusters compare with, and how often they are repeated."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator

import pytest
from support.load import Body, Tokens, ask_all
from support.processes import Processes
from support.undisturbed import Undisturbed


class Golden:
    """What requests say undisturbed: asked of a colocated worker that nobody harms, once each."""

    def __init__(self, quiet: Processes) -> None:
        self._quiet = quiet
        self._known: dict[str, Tokens] = {}

    def __call__(self, requests: list[Body]) -> list[Undisturbed]:
        keys = [json.dumps(request | {"stream": False, "cache_salt": ""}, sort_keys=True) for request in requests]
        fresh = {key: request for key, request in zip(keys, requests, strict=True) if key not in self._known}
        answers = ask_all(self._quiet.url, fresh.values())
        assert all(answer.good for answer in answers)
        self._known |= {key: answer.tokens for key, answer in zip(fresh, answers, strict=True)}
        return [
            Undisturbed(self._known[key], request, lambda other: self([other])[0])
            for key, request in zip(keys, requests, strict=True)
        ]


@pytest.fixture(scope="session", autouse=True)
def first_start(compiled_kernels: None) -> None:
    """No worker of a test is the first on this host."""


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Golden]:
    pools = {"pools": {"colocated": {}}, "kv": {"capacity": "256MiB"}}
    with Processes(tmp_path_factory.mktemp("golden"), pools, {"colocated-0": {}}) as quiet:
        quiet.serve()
        yield Golden(quiet)


@pytest.fixture
def seeds(soak_minutes: float) -> Iterator[int]:
    """Seed 0; in a soak, random ones for as long as it takes. A failure's seed is the last that was printed."""

    def draw() -> Iterator[int]:
        yield 0
        until_s = time.monotonic() + soak_minutes * 60
        while time.monotonic() < until_s:
            seed = random.SystemRandom().randrange(1 << 31)
            print(f"seed {seed}", flush=True)
            yield seed

    return draw()
