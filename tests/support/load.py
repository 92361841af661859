"""Many requests at once, and what became of each: the tokens, or one clean error, and nothing else."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import httpx

from .undisturbed import Undisturbed

Body = dict[str, Any]
Tokens = dict[int, list[int]]
"""Of each choice, by its index."""


class Answer(NamedTuple):
    """What a client got."""

    status: int
    """Of HTTP; 0 when the client left."""
    tokens: Tokens
    error: str
    """Of the body or of the stream's last event; "" when there was none."""
    complete: bool
    """Every choice has a finish_reason."""
    request_id: str
    seconds: float
    broken: bool = False
    """The connection broke."""

    @property
    def good(self) -> bool:
        return self.status == 200 and not self.error and self.complete


def body(index: int, **changes: Any) -> Body:
    """The ``index``-th of many different requests, found in no prefix cache."""
    length = 40 + 37 * index % 240
    return {
        "prompt": [(31 * index + 7 * j) % 4000 + 5 for j in range(length)], "max_tokens": 24, "temperature": 1.0,
        "seed": index, "ignore_eos": True, "return_token_ids": True, "stream": index % 2 == 1,
        "cache_salt": f"{index}-{time.monotonic_ns()}",
    } | changes  # fmt: skip


async def ask(
    client: httpx.AsyncClient, request: Body, leave_after_s: float | None = None, *, broken: bool = False
) -> Answer:
    """Send one request; the client may leave before it is answered, and the connection may be ``broken``."""
    started_s = time.monotonic()
    tokens: Tokens = {}
    finished: set[int] = set()
    told: list[str] = [""]
    status = [0]
    request_id = [""]

    def take(answer: dict[str, Any]) -> None:
        if "error" in answer:
            assert not told[0], "a second error"
            told[0] = answer["error"]["message"]
        for choice in answer.get("choices", ()):
            assert not told[0], "tokens after an error"
            tokens.setdefault(choice["index"], []).extend(choice["token_ids"])
            if choice["finish_reason"]:
                finished.add(choice["index"])

    async def run() -> None:
        if not request.get("stream"):
            answer = await client.post("/v1/completions", json=request)
            status[0], request_id[0] = answer.status_code, answer.headers.get("x-request-id", "")
            take(answer.json())
            return
        async with client.stream("POST", "/v1/completions", json=request) as stream:
            status[0], request_id[0] = stream.status_code, stream.headers.get("x-request-id", "")
            if stream.status_code != 200:
                take(json.loads(await stream.aread()))
                return
            ended = False
            async for line in stream.aiter_lines():
                if line.startswith("data: {"):
                    take(json.loads(line[6:]))
                ended |= line == "data: [DONE]"
            assert ended != bool(told[0]), "a stream ends with [DONE] or with an error"

    try:
        await asyncio.wait_for(run(), leave_after_s)
    except TimeoutError:
        status[0] = 0
    except httpx.TransportError:
        if not broken:
            raise
        status[0] = 0
        return Answer(0, tokens, told[0], False, request_id[0], time.monotonic() - started_s, True)
    prompts = request["prompt"] if isinstance(request["prompt"][0], list) else [request["prompt"]]
    wanted = set(range(len(prompts) * request.get("n", 1)))
    seconds = time.monotonic() - started_s
    return Answer(status[0], tokens, told[0], finished == wanted, request_id[0], seconds)


def connecting(url: str, timeout_s: float) -> httpx.AsyncClient:
    """A client of the gateway. One that may leave in the middle needs its own: a request that is cancelled between getting
    a connection and using it keeps this connection from all others of its pool for ever."""
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=url, timeout=timeout_s, limits=limits, trust_env=False, verify=False)


def ask_all(
    url: str,
    requests: Iterable[Body],
    at_once: int = 16,
    leave: Callable[[int], float | None] = lambda index: None,
    timeout_s: float = 100,
    broken: bool = False,
) -> list[Answer]:
    """Send requests, so many at a time; the answers in their order. Blocks until all are answered.

    Args:
        url: of the gateway.
        requests: bodies.
        at_once: clients.
        leave: after how many seconds the client of the n-th request leaves; None: it stays.
        timeout_s: of a connection that says nothing.
        broken: whether connections may break.
    """
    answers: dict[int, Answer] = {}

    async def run() -> None:
        async with connecting(url, timeout_s) as client:
            pending = iter(enumerate(requests))

            async def one_client() -> None:
                for index, request in pending:
                    leave_after_s = leave(index)
                    if leave_after_s is None:
                        answers[index] = await ask(client, request, broken=broken)
                        continue
                    async with connecting(url, timeout_s) as leaving:
                        answers[index] = await ask(leaving, request, leave_after_s, broken=broken)

            await asyncio.gather(*(one_client() for _ in range(at_once)))

    asyncio.run(run())
    return [answers[index] for index in sorted(answers)]


class Load:
    """`ask_all` in the background."""

    def __init__(self, url: str, requests: Iterable[Body], at_once: int = 12, **options: Any) -> None:
        self._answers: list[Answer] = []
        self._thread = threading.Thread(
            target=lambda: self._answers.extend(ask_all(url, requests, at_once, **options)), name="load"
        )
        self._thread.start()

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()

    @property
    def running(self) -> bool:
        """Whether some are not answered yet."""
        return self._thread.is_alive()

    def answers(self) -> list[Answer]:
        """All answers, when they are there."""
        self._thread.join()
        return self._answers


def check(answers: Iterable[Answer], golden: Iterable[Tokens], errors: bool = False) -> int:
    """Every answer is the undisturbed one, or, if ``errors`` may be, one clean error; returns how many are errors.

    Args:
        answers: to requests.
        golden: the same requests' undisturbed tokens.
        errors: whether an error is a good answer.
    """
    failed = 0
    for index, (answer, want) in enumerate(zip(answers, golden, strict=True)):
        if answer.status == 0:  # the client left
            continue
        if errors and answer.error:
            assert answer.status == 503 or (answer.status == 200 and not answer.complete), answer
            for choice, tokens in answer.tokens.items():  # what came before it is right all the same
                assert _allowed(want, choice, tokens, whole=False), (index, tokens, want)
            failed += 1
            continue
        assert answer.good, (index, answer)
        assert answer.tokens.keys() == want.keys(), (index, answer, want)
        for choice, tokens in answer.tokens.items():
            assert _allowed(want, choice, tokens), (index, tokens, want)
    return failed


def _allowed(want: Tokens, choice: int, tokens: list[int], *, whole: bool = True) -> bool:
    if isinstance(want, Undisturbed):
        return want.allows(choice, tokens, whole=whole)
    return tokens == (want[choice] if whole else want[choice][: len(tokens)])
