"""Tokens a second through a gateway to clients that stream, with an engine that computes nothing; and, in turns with
it, through a bare uvicorn application that sends the same bytes from memory: an event each turn of its loop, as tokens
come (`raw`); all in one turn, such that sockets are given many events at once (`raw_bulk`); or an event for each stream
whenever a byte in a pipe tells that clients want one, as far ahead of them as the engine is (`raw_in_step`).

Usage: python -m tandem.bench.gateway [--streams 64] [--tokens 1000] [--tokens-per-step 1] [--ahead 16] [--repeats 5]

Gateway and baselines are processes of their own on the first core, one of them loaded at a time. On the last core are
the clients and the engine, a real member of the mesh. Each of its steps has tokens for each stream. It is ahead of the
clients by some steps, as an engine is that makes more than a gateway can pass on; `raw` and `raw_bulk` are ahead by
what buffers of sockets hold, where the system makes larger packets of events. With ``--ahead 1`` every token is an
event, and a packet, of its own; `raw_in_step` tells what uvicorn and the system alone take for such packets.

On a busy machine the clients may be what is slow: `tokens_per_cpu_s` counts the processor time of who serves.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import socket
import statistics
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import msgspec
import psutil
import uvicorn
import uvloop

from ..cluster.gateway.runtime import GatewayRuntime
from ..cluster.mesh import Mesh
from ..core.config import Config, load_config
from ..core.ids import PeerId
from ..core.messages import (
    ChildUpdate,
    FinishReason,
    Generate,
    Member,
    Membership,
    Message,
    Report,
    Subscribe,
    Update,
    encode,
)
from ..core.wire import ClusterKeys, SecureContext, make_cluster_keys
from .machine import describe

_ENGINE = "colocated-0#1"
_TOKEN, _TEXT = 34, b"@"
"""Of the demo model's vocabulary; nothing else of an event has this character."""
_CHUNK = (
    b'data: {"id":"cmpl-0123456789abcdef01234567","created":1700000000,"model":"demo","object":"text_completion",'
    b'"choices":[{"index":0,"finish_reason":null,"logprobs":null,"text":"%s"}]}\n\n'
)


class Load(NamedTuple):
    """What each run is."""

    streams: int
    tokens: int
    tokens_per_step: int
    ahead: int
    """Steps that clients lack at most."""


# ---- what is measured, each in a process of its own -----------------------------------------------------------------


def _serve_gateway(port: int, keys: ClusterKeys, pipe: Connection) -> None:
    os.sched_setaffinity(0, {0})
    config = load_config().model_dump() | {"gateway": {"port": port, "host": "127.0.0.1", "max_queued": 1 << 16}}
    runtime = GatewayRuntime("gateway-0#1", Config.model_validate(config), keys, "127.0.0.1", lambda phase: None)
    runtime.start()
    runtime.follow(msgspec.msgpack.decode(pipe.recv(), type=Membership))
    pipe.send("ready")
    pipe.recv()
    runtime.stop(1.0)


def _serve_raw(port: int, load: Load, in_turns: bool, steps: Connection | None, pipe: Connection) -> None:
    os.sched_setaffinity(0, {0})
    chunk = _CHUNK % (_TEXT * load.tokens_per_step)

    all_there, num_there = asyncio.Event(), 0
    made, waiting = 0, list[asyncio.Future[None]]()

    def step() -> None:
        nonlocal made, waiting
        assert steps is not None
        made += len(os.read(steps.fileno(), 4096))
        woken, waiting = waiting, []
        for stream in woken:
            stream.set_result(None)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal all_there, num_there, made
        loop = asyncio.get_running_loop()
        num_there += 1
        if num_there == load.streams:
            all_there.set()
            all_there, num_there = asyncio.Event(), 0
            if steps is not None:
                made = 0
                loop.add_reader(steps.fileno(), step)
                steps.send_bytes(b"all there")
        else:
            await all_there.wait()
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for number in range(load.tokens // load.tokens_per_step):
            while steps is not None and made <= number:
                waiting.append(loop.create_future())
                await waiting[-1]
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
            if in_turns:
                await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    config = uvicorn.Config(app, host="127.0.0.1", port=port, lifespan="off", log_config=None, access_log=False)
    server = uvicorn.Server(config)
    threading.Thread(target=lambda: uvloop.run(server.serve())).start()
    while not server.started:
        time.sleep(0.01)
    pipe.send("ready")
    pipe.recv()
    server.should_exit = True


# ---- the engine and the clients -------------------------------------------------------------------------------------


class _Engine:
    """A worker that makes up its tokens. Its messages come on the mesh's thread; all else is the loop's."""

    def __init__(self, keys: ClusterKeys, load: Load) -> None:
        self._load = load
        self._came = threading.Condition()
        self._context = SecureContext(keys)
        self._mesh = Mesh(_ENGINE, self._context, "127.0.0.1", self._receive, lambda peer: None, lambda: None)
        self._mesh.start()
        self.member = Member(_ENGINE, "colocated", "n", self._mesh.endpoint)
        self.gateway: PeerId = ""
        self.tickets: list[int] = []
        self.left = 0

    def _receive(self, sender: PeerId, message: Message) -> None:
        if isinstance(message, Subscribe):
            self._mesh.send(sender, Report(0, 0, 0, 1000, 1000))
        elif isinstance(message, Generate):
            self.gateway = sender
            with self._came:
                self.tickets.append(message.ticket)
                self._came.notify_all()

    async def all_there(self, count: int) -> None:
        """Until so many streams have come."""

        def wait() -> None:
            with self._came:
                self._came.wait_for(lambda: len(self.tickets) >= count, 60)

        await asyncio.to_thread(wait)

    def step(self) -> None:
        """Tokens for each stream, and their end with the last."""
        size = self._load.tokens_per_step
        self.left -= size
        finish = FinishReason.LENGTH if self.left <= 0 else None
        tokens = [_TOKEN] * size
        self._mesh.send(self.gateway, Update([ChildUpdate(t, 0, tokens, None, finish) for t in self.tickets]))

    def close(self) -> None:
        self._mesh.close()
        self._context.close()


class _Steps:
    """Tells a baseline when to send. Has what `_run` asks of an engine."""

    def __init__(self, load: Load, pipe: Connection) -> None:
        self._load = load
        self._pipe = pipe
        self.tickets: list[int] = []
        self.left = 0

    async def all_there(self, count: int) -> None:
        """Until all streams have come."""
        await asyncio.to_thread(self._pipe.recv_bytes)

    def step(self) -> None:
        """An event for each stream."""
        self.left -= self._load.tokens_per_step
        os.write(self._pipe.fileno(), b"x")


class _Client(asyncio.Protocol):
    def __init__(self, head: bytes, got: Callable[[bytes], None], ended: Callable[[], None]) -> None:
        self._head, self._got, self._ended = head, got, ended

    def connection_made(self, transport: Any) -> None:
        transport.write(self._head)

    def data_received(self, data: bytes) -> None:
        self._got(data)

    def connection_lost(self, error: Exception | None) -> None:
        self._ended()


async def _run(port: int, process: psutil.Process, load: Load, engine: _Engine | _Steps | None) -> dict[str, float]:
    """One run, against the gateway or a baseline; without an engine, one that needs not be told when to send."""
    loop = asyncio.get_running_loop()
    body = json.dumps({"prompt": [5, 6, 7], "stream": True, "max_tokens": load.tokens, "temperature": 0}).encode()
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body)
    ) + body
    size = load.streams * load.tokens_per_step
    tokens = events = open_streams = made = 0
    done = asyncio.Event()

    def got(data: bytes) -> None:
        nonlocal tokens, events
        tokens += data.count(_TEXT)
        events += data.count(b"data: {")
        feed()

    def feed() -> None:
        nonlocal made
        while engine is not None and engine.left > 0 and made - tokens <= (load.ahead - 1) * size:
            engine.step()
            made += size

    def ended() -> None:
        nonlocal open_streams
        open_streams -= 1
        if not open_streams:
            done.set()

    if engine is not None:
        engine.tickets, engine.left = [], 0
    open_streams = load.streams
    began_s, cpu = time.perf_counter(), process.cpu_times()
    for _ in range(load.streams):
        await loop.create_connection(lambda: _Client(head, got, ended), "127.0.0.1", port)
    if engine is None:
        began_s, cpu = time.perf_counter(), process.cpu_times()
    else:
        await engine.all_there(load.streams)
        # From here on: what streams cost, not what their beginnings do.
        began_s, cpu = time.perf_counter(), process.cpu_times()
        engine.left = load.tokens
        feed()
    await asyncio.wait_for(done.wait(), 300)
    seconds, after = time.perf_counter() - began_s, process.cpu_times()
    assert tokens == load.streams * load.tokens, (tokens, load)
    cpu_s = after.user + after.system - cpu.user - cpu.system
    return {
        "tokens_per_s": round(tokens / seconds, 1),
        "tokens_per_cpu_s": round(tokens / cpu_s, 1),
        "cpu_us_per_event": round(cpu_s / events * 1e6, 3),
        "events_per_s": round(events / seconds, 1),
        "tokens_per_event": round(tokens / events, 3),
    }


def measure(load: Load, repeats: int) -> dict[str, Any]:
    """All arms, in turns; medians over the repetitions, and all of them. Blocks."""
    os.sched_setaffinity(0, {(os.cpu_count() or 1) - 1})
    context = multiprocessing.get_context("spawn")
    keys, ports = make_cluster_keys(), [_free_port() for _ in range(4)]
    engine = _Engine(keys, load)
    near, far = context.Pipe()
    pipes, processes = [], []
    servers: list[tuple[Callable[..., None], tuple[Any, ...]]] = [
        (_serve_gateway, (ports[0], keys)),
        (_serve_raw, (ports[1], load, True, None)),
        (_serve_raw, (ports[2], load, False, None)),
        (_serve_raw, (ports[3], load, False, far)),
    ]
    for target, arguments in servers:
        pipe, far_end = context.Pipe()
        processes.append(context.Process(target=target, args=(*arguments, far_end), daemon=True))
        processes[-1].start()
        pipes.append(pipe)
    try:
        pipes[0].send(encode(Membership(1, [engine.member])))
        for pipe in pipes:
            pipe.recv()
        names, feeds = ("gateway", "raw", "raw_bulk", "raw_in_step"), (engine, None, None, _Steps(load, near))
        arms = dict(zip(names, zip(ports, processes, feeds, strict=True), strict=True))
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
        for repeat in range(repeats + 1):
            for name in list(arms)[:: 1 if repeat % 2 == 0 else -1]:
                port, process, fed_by = arms[name]
                assert process.pid is not None
                figures = uvloop.run(_run(port, psutil.Process(process.pid), load, fed_by))
                if repeat:  # the first is to warm up
                    runs[name].append(figures)
    finally:
        for pipe, process in zip(pipes, processes, strict=True):
            pipe.send("stop")
            process.join(10)
            process.kill()
        engine.close()
    medians = {
        name: {figure: statistics.median(run[figure] for run in own) for figure in own[0]} for name, own in runs.items()
    }
    ratios = {
        f"of_{name}": {
            figure: round(medians["gateway"][figure] / medians[name][figure], 4)
            for figure in ("tokens_per_s", "tokens_per_cpu_s")
        }
        for name in ("raw", "raw_bulk", "raw_in_step")
    }
    return {
        "bench": "gateway", **load._asdict(), "repeats": repeats, "median": medians, "runs": runs,
        **ratios, "must": 0.5, "aim": 0.8,
        "load_average": round(os.getloadavg()[0], 2), "machine": describe(),
    }  # fmt: skip


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def main() -> None:
    """Print a JSON line."""
    parser = argparse.ArgumentParser(prog="python -m tandem.bench.gateway", description=__doc__)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=1000, help="of each stream, a multiple of those of a step")
    parser.add_argument("--tokens-per-step", type=int, default=1, help="of each stream: what comes in one message")
    parser.add_argument("--ahead", type=int, default=16, help="steps that clients lack at most")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    print(json.dumps(measure(Load(given.streams, given.tokens, given.tokens_per_step, given.ahead), given.repeats)))


if __name__ == "__main__":
    main()
