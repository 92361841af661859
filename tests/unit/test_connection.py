"""Streams to clients over real sockets: slow ones, ones that leave, many prompts in one response."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
import uvicorn
from prometheus_client import CollectorRegistry
from tandem.cluster.gateway import connection as connection_module
from tandem.cluster.gateway.app import Api
from tandem.cluster.gateway.connection import Connection
from tandem.cluster.gateway.dispatcher import Dispatcher
from tandem.cluster.gateway.generation import Model
from tandem.cluster.gateway.timeline import Timelines
from tandem.cluster.router import Router
from tandem.core.clock import SystemClock
from tandem.core.config import GatewayConfig
from tandem.core.ids import PeerId
from tandem.core.messages import (
    Abort,
    ChildUpdate,
    FinishReason,
    Generate,
    Member,
    Membership,
    Message,
    Refused,
    Report,
    Update,
)
from tandem.core.metrics import GatewayMetrics

_WORKER = "colocated-0#1"
_TIMEOUT_S = 60.0


class Served:
    """A gateway's HTTP on a port of this host, whose worker is the test."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.news = asyncio.Event()
        clock, metrics, config = SystemClock(), GatewayMetrics(CollectorRegistry()), GatewayConfig()
        self.dispatcher = Dispatcher(config, Router("least_loaded"), clock, metrics, self._send)
        self.dispatcher.on_finish = lambda live: self.news.set()
        self.dispatcher.follow(Membership(1, [Member(_WORKER, "colocated", "n", "tcp://x:1")]))
        self.dispatcher.receive(_WORKER, Report(0, 0, 0, 1000, 1000))
        model, timelines = Model("demo", None, 1 << 16, 1 << 20, ()), Timelines("gateway-0#1", clock)

        async def scrape() -> str:
            return ""

        api = Api(config, model, self.dispatcher, timelines, metrics, clock, lambda: "", scrape)
        self.server = uvicorn.Server(
            uvicorn.Config(api.app, http=Connection, log_config=None, access_log=False, lifespan="off")
        )

    def _send(self, peer: PeerId, message: Message) -> None:
        self.sent.append(message)
        self.news.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Until what was sent, and who is served, makes something so."""
        while not condition():
            self.news.clear()
            await asyncio.wait_for(self.news.wait(), _TIMEOUT_S)

    async def tickets(self, count: int) -> list[int]:
        """Of the requests, when so many have come."""

        def found() -> list[int]:
            return [message.ticket for message in self.sent if isinstance(message, Generate)]

        await self.until(lambda: len(found()) == count)
        return found()

    def tokens(self, ticket: int, tokens: list[int], finish: FinishReason | None = None, index: int = 0) -> None:
        """The worker has tokens."""
        self.dispatcher.receive(_WORKER, Update([ChildUpdate(ticket, index, tokens, None, finish)]))


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[tuple[Served, int]]:
    served = Served()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        task = asyncio.create_task(served.server.serve(sockets=[listening]))
        try:
            yield served, listening.getsockname()[1]
        finally:
            served.server.should_exit = True
            await task


async def polled(condition: Callable[[], bool]) -> None:
    """Until something is so of which nobody tells."""
    async with asyncio.timeout(_TIMEOUT_S):
        while True:
            if condition():
                return
            await asyncio.sleep(0.01)


async def ask(port: int, **body: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A streaming request, and what comes behind the answer's head."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.setblocking(False)
    await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=client, limit=4096)
    asked = json.dumps({"stream": True, "return_token_ids": True, **body}).encode()
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(asked)
        + asked
    )
    return reader, writer


async def events(reader: asyncio.StreamReader) -> list[Any]:
    """All events of a response."""
    async with asyncio.timeout(_TIMEOUT_S):
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"transfer-encoding: chunked" in head
        text = b""
        while size := int(await reader.readline(), 16):
            text += (await reader.readexactly(size + 2))[:-2]
    lines = [event.removeprefix("data: ") for event in text.decode().split("\n\n")[:-1]]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def ids(found: list[Any], index: int) -> list[int]:
    """Tokens of a choice."""
    choices = [choice for event in found if event != "[DONE]" for choice in event["choices"]]
    return [token for choice in choices if choice["index"] == index for token in choice["token_ids"]]


def test_what_comes_while_a_client_is_slow_waits_as_one_event() -> None:
    async def run() -> None:
        async with serving() as (served, port):
            reader, writer = await ask(port, prompt=[1], max_tokens=1 << 19)
            [ticket] = await served.tickets(1)
            [connection] = served.server.server_state.connections
            assert isinstance(connection, Connection)
            steps = 0

            async def step(finish: FinishReason | None = None) -> None:
                nonlocal steps
                served.tokens(ticket, [*range(steps * 300, steps * 300 + 300)], finish)
                steps += 1
                await asyncio.sleep(0)

            async with asyncio.timeout(_TIMEOUT_S):
                while not connection.is_slow:
                    await step()
            held = connection.transport.get_write_buffer_size()
            for _ in range(100):
                await step()
            await step(FinishReason.LENGTH)
            assert connection.transport.get_write_buffer_size() <= held
            found = await events(reader)
            assert ids(found, 0) == list(range(steps * 300))
            assert len(found) < steps - 50, "what waited came together"
            assert found[-1] == "[DONE]"
            writer.close()
            assert served.dispatcher.num_live == 0

    asyncio.run(run())


def test_a_slow_client_that_leaves_is_forgotten() -> None:
    async def run() -> None:
        async with serving() as (served, port):
            _, writer = await ask(port, prompt=[1], max_tokens=1 << 19)
            [ticket] = await served.tickets(1)
            [connection] = served.server.server_state.connections
            assert isinstance(connection, Connection)
            async with asyncio.timeout(_TIMEOUT_S):
                while not connection.is_slow:
                    served.tokens(ticket, [7])
                    await asyncio.sleep(0)
            served.tokens(ticket, [8])
            writer.transport.abort()
            await served.until(lambda: served.dispatcher.num_live == 0)
            assert served.sent[-1] == Abort([ticket])
            served.tokens(ticket, [9])

    asyncio.run(run())


def test_prompts_of_one_response_end_together_or_with_an_error() -> None:
    async def run() -> None:
        async with serving() as (served, port):
            reader, writer = await ask(
                port, prompt=[[1], [2]], n=2, max_tokens=9, stream_options={"include_usage": True}
            )
            first, second = await served.tickets(2)
            served.tokens(first, [5, 6], FinishReason.LENGTH)
            served.tokens(second, [7], index=1)
            served.tokens(first, [8], FinishReason.STOP, index=1)
            await asyncio.sleep(0.01)
            served.tokens(second, [9], FinishReason.STOP, index=1)
            served.tokens(second, [10], FinishReason.STOP)
            found = await events(reader)
            assert [ids(found, index) for index in range(4)] == [[5, 6], [8], [10], [7, 9]]
            assert found[-2]["usage"]["completion_tokens"] == 6
            assert [event["usage"] for event in found[:-2]] == [None] * (len(found) - 2)
            assert found[-1] == "[DONE]"
            writer.close()

            served.sent.clear()
            reader, writer = await ask(port, prompt=[[1], [2]], max_tokens=9)
            first, second = await served.tickets(2)
            served.tokens(first, [5])
            served.tokens(second, [6])
            served.dispatcher.receive(_WORKER, Refused(second, 503, "because"))
            found = await events(reader)
            assert (ids(found[:-1], 0), ids(found[:-1], 1)) == ([5], [6])
            assert found[-1]["error"]["message"] == "because"
            writer.close()
            assert served.dispatcher.num_live == 0
            assert served.sent[-1] == Abort([first])

    asyncio.run(run())


def test_a_gateway_that_leaves_answers_once_more_and_breaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "_LINGER_S", 1)

    async def run() -> None:
        async with contextlib.AsyncExitStack() as stack:
            served, port = await stack.enter_async_context(serving())
            streaming, asking, silent = [
                await stack.enter_async_context(
                    httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=_TIMEOUT_S, trust_env=False)
                )
                for _ in range(3)
            ]
            for client in (streaming, asking, silent):
                assert (await client.get("/livez")).headers.get("connection") != "close"
            body = {"prompt": [1], "max_tokens": 9, "stream": True, "return_token_ids": True}
            async with streaming.stream("POST", "/v1/completions", json=body) as stream:
                [ticket] = await served.tickets(1)
                lines = stream.aiter_lines()
                served.tokens(ticket, [5])
                assert '"token_ids":[5]' in await anext(lines)
                for connection in list(served.server.server_state.connections):
                    assert isinstance(connection, Connection)
                    connection.leave()
                served.server.should_exit = True
                await polled(lambda: not served.server.servers[0].is_serving())
                answer = await asking.get("/livez")
                assert (answer.status_code, answer.headers["connection"]) == (200, "close")
                served.tokens(ticket, [6], FinishReason.LENGTH)
                assert [line async for line in lines if line][-1] == "data: [DONE]"
            answer = await streaming.get("/livez")  # it came by the stream's connection: nobody listens any more
            assert (answer.status_code, answer.headers["connection"]) == (200, "close")
            await polled(lambda: not served.server.server_state.connections)
            with pytest.raises(httpx.ConnectError):
                await silent.get("/livez")

    asyncio.run(run())
