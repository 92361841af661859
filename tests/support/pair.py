"""A prefill and a decode worker in one thread, joined by lists instead of sockets: the real workers, single-stepped."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from prometheus_client import CollectorRegistry
from tandem.core.clock import ManualClock
from tandem.core.config import ColocatedPool, Config, DecodePool, PrefillPool
from tandem.core.messages import (
    Abort,
    Child,
    FinishReason,
    Generate,
    Member,
    Membership,
    Message,
    Moved,
    PromptLogprobs,
    Refused,
    Sampling,
    Stopping,
    TokenLogprobs,
    Update,
    Usage,
    decode,
    encode,
)
from tandem.core.metrics import WorkerMetrics
from tandem.decode.worker import DecodeWorker
from tandem.engine.build import build_engine
from tandem.engine.kv_cache import KVCache
from tandem.engine.load_cost import LoadCost
from tandem.engine.models.shard import kv_heads_of
from tandem.engine.offloader import Offloader
from tandem.engine.ranks import Ranks, build_on_ranks
from tandem.engine.tiers import Tiers
from tandem.kv_transfer.connector import GENERATIONS, Connector
from tandem.kv_transfer.ends import End, first_end
from tandem.kv_transfer.hidden_states import open_writer
from tandem.kv_transfer.transports import Transport
from tandem.kv_transfer.transports.faulty import FaultyTransport
from tandem.kv_transfer.transports.inproc import InprocTransport
from tandem.prefill.worker import PrefillWorker

from .thread_ranks import ThreadRanks, build_on_threads

GATEWAY = "gateway-0#1"


class Output:
    """What a client would have received of one request."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.logprobs: dict[int, list[TokenLogprobs]] = {}
        self.finish: dict[int, FinishReason] = {}
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.refused: Refused | None = None
        self.usage: Usage | None = None
        self.stages: list[str] = []
        self.moved: dict[int, Moved] = {}


class Node:
    """One worker, its engine and its transport."""

    def __init__(self, pair: Pair, peer: str, role: str, config: Config) -> None:
        self.peer = peer
        self.config = config
        self.metrics = WorkerMetrics(CollectorRegistry())
        pool: PrefillPool | DecodePool
        match role:
            case "prefill":
                pool = config.pools.prefill or PrefillPool()
            case "decode":
                pool = config.pools.decode or DecodePool()
            case _:
                pool = config.pools.colocated or ColocatedPool()
        self.device = pair.device_of(role)
        self.ranks: ThreadRanks | Ranks | None = None
        if pair.processes:
            built, self.ranks = build_on_ranks(config, pool, 1, lambda *_: None)
        elif pool.tensor_parallel > 1:
            built, self.ranks = build_on_threads(
                config, pool.max_running, pool.max_batched_tokens, pool.tensor_parallel, pair.overlap
            )
        else:
            with self.here():
                built = build_engine(
                    config, pool.max_running, self.device, lambda *_: None, pool.max_batched_tokens, pair.overlap
                )
        self.engine = built.engine
        cache, model, layout = self.engine.cache, self.engine.model, self.engine.cache.layout
        self.transport: Transport = pair.transport_of(cache)
        if config.kv.inject_faults is not None and role == "decode":
            self.transport = FaultyTransport(self.transport, config.kv.inject_faults, lambda: None, GENERATIONS)
        self.writer = open_writer(config.hidden_states, model.spec.hidden, model.dtype, self.metrics)
        heads = [kv_heads_of(model.spec, rank, pool.tensor_parallel) for rank in range(pool.tensor_parallel)]
        ends = [first_end(heads[0], {self.transport.name: self.transport}, cache.blocks, cache.generations_buffer)]
        if isinstance(self.ranks, ThreadRanks):
            memory = self.ranks.memory("kv.checksums")
            ends += [
                End(held, moving, "host", blocks)
                for held, moving, blocks in zip(heads[1:], self.ranks.transports, memory, strict=True)
            ]
        self.connector = Connector(
            peer, built.fingerprint, layout, self.engine.groups, self.engine.runner.layer_groups, ends,
            "auto", config.kv.lease_s, pair.clock, self.metrics, config.kv.checksums,
        )  # fmt: skip

        tiers = pair.tiers_of(pair, self, role)
        # Time stands still: nothing is measured, and every load is worth it.
        num_tiers = 0 if tiers is None else len(tiers.stack.levels)
        free = LoadCost(num_tiers, layout.block_bytes, latency_s=0.0, s_per_byte=0.0)
        self.offloader: Offloader[Any] = Offloader(self.engine, tiers, pair.clock, self.metrics, free)

        def send(to: str, message: Message) -> None:
            pair.post(peer, to, message)

        self.worker: PrefillWorker | DecodeWorker
        if isinstance(pool, PrefillPool):
            self.worker = PrefillWorker(
                self.engine, self.connector, pool, built.fingerprint, config.kv.lease_s, built.max_model_len,
                pair.clock, self.metrics, send, self.writer, self.offloader,
            )  # fmt: skip
        else:
            self.worker = DecodeWorker(
                self.engine, self.connector, pool, config, built.fingerprint, built.max_model_len, pair.clock,
                self.metrics, send, self.writer, self.offloader,
            )  # fmt: skip

    def here(self) -> AbstractContextManager[object]:
        """What concerns the worker happens on its device."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def check_idle(self) -> None:
        """All blocks are free, and the pool is consistent."""
        self.engine.pool.check()
        assert self.engine.pool.num_free == self.engine.pool.num_blocks

    def close(self) -> None:
        self.offloader.close()
        self.transport.close()
        if self.ranks is not None:
            self.ranks.close()


class Pair:
    """Workers of a configuration, and a client.

    Every message is encoded and decoded, as on the wire. ``deliver`` may drop or hold messages.

    Args:
        config: which workers there are.
        overlap: decode runs a step ahead of its outcomes, as it does on a GPU.
        prefill: the configuration of the prefill workers, where it is another.
        device_of: where a role computes.
        transport_of: what reads into a cache, and out of it.
        tiers_of: makes the tiers of a worker, which call `news.set`; None: it has none.
        processes: ranks are processes, as they are in service; of workers that do both, as no other reads from them.
    """

    def __init__(
        self,
        config: Config,
        overlap: bool = False,
        prefill: Config | None = None,
        device_of: Callable[[str], torch.device] = lambda role: torch.device("cpu"),
        transport_of: Callable[[KVCache], Any] = lambda cache: InprocTransport(lambda: None),
        tiers_of: Callable[[Pair, Node, str], Tiers | None] = lambda pair, node, role: None,
        processes: bool = False,
    ) -> None:
        self.tiers_of = tiers_of
        self.processes = processes
        self.news = threading.Event()
        self.overlap = overlap
        self.device_of = device_of
        self.transport_of = transport_of
        self.clock = ManualClock()
        self.config = config
        self.prefill_config = prefill or config
        self.outputs: dict[int, Output] = {}
        self.deliver: Callable[[str, str, Message], bool] = lambda sender, to, message: True
        self._wire: deque[tuple[str, str, bytes]] = deque()
        self._ticket = 0
        self.nodes: dict[str, Node] = {}
        if config.pools.colocated:
            self.decode = self.add("colocated-0#1", "colocated")
        else:
            self.prefill = self.add("prefill-0#1", "prefill")
            self.decode = self.add("decode-0#1", "decode")
        self.announce()
        self.pump()

    def add(self, peer: str, role: str) -> Node:
        config = self.prefill_config if role == "prefill" else self.config
        node = self.nodes[peer] = Node(self, peer, role, config)
        return node

    def remove(self, peer: str) -> None:
        """A worker dies: its memory and its messages are gone."""
        node = self.nodes.pop(peer)
        node.close()
        self._wire = deque(item for item in self._wire if peer not in item[:2])
        for other in self.nodes.values():
            with other.here():
                other.worker.peer_lost(peer)
        self.announce()

    def announce(self, ending: tuple[str, ...] = ()) -> None:
        """Tell everybody who is there, and who is about to end."""
        members = [
            Member(peer, peer.split("-")[0], "node", "", peer not in ending, peer in ending)
            for peer in (*self.nodes, GATEWAY)
        ]
        for node in self.nodes.values():
            with node.here():
                node.worker.handle("controller", Membership(1, members))

    def post(self, sender: str, to: str, message: Message) -> None:
        self._wire.append((sender, to, encode(message)))

    def submit(
        self,
        tokens: list[int],
        *,
        max_tokens: int = 8,
        sampling: Sampling = Sampling(),
        stop_ids: list[int] | None = None,
        seeds: list[int] | None = None,
        prompt_logprobs: int = -1,
        num_prompt_tokens: int | None = None,
        salt: str = "",
        prefill: str | None = None,
        hidden_states: str = "",
        children: list[Child] | None = None,
        request_id: str = "",
        priority: int = 0,
    ) -> int:
        """Send a request; returns its ticket."""
        self._ticket += 1
        self.outputs[self._ticket] = Output()
        children = children or [Child(index, seed) for index, seed in enumerate(seeds or [0])]
        peer = next((p for p in self.nodes if p.startswith("prefill")), "") if prefill is None else prefill
        request = Generate(
            self._ticket, request_id or f"r{self._ticket}", tokens, num_prompt_tokens or len(tokens), children, sampling,
            Stopping(max_tokens, stop_ids or []), prompt_logprobs, salt, peer,
            hidden_states, priority=priority,
        )  # fmt: skip
        self.post(GATEWAY, self.decode.peer, request)
        return self._ticket

    def abort(self, ticket: int, child: int = -1) -> None:
        self.post(GATEWAY, self.decode.peer, Abort([ticket], child))

    def pump(self) -> None:
        """Deliver every message that is on its way, and those that they lead to."""
        for _ in range(len(self._wire)):
            sender, to, frame = self._wire.popleft()
            message = decode(frame)
            if not self.deliver(sender, to, message):
                continue
            if to == GATEWAY:
                self._receive(message)
            elif to in self.nodes:
                with self.nodes[to].here():
                    self.nodes[to].worker.handle(sender, message)

    def turn(self) -> bool:
        """Deliver, and let each worker take one step. Returns whether anything happened."""
        busy = bool(self._wire)
        self.pump()
        for node in list(self.nodes.values()):
            with node.here():
                node.worker.tick()
                busy |= node.worker.step()
        if self.decode.connector.num_pulls and not busy:
            time.sleep(1e-4)  # reads of other ranks and of GPUs go on in threads
        waits = any(node.offloader.num_open for node in self.nodes.values())
        if waits and not busy:
            self.news.wait(1e-3)
            self.news.clear()
        return busy or waits or bool(self._wire) or bool(self.decode.connector.num_pulls)

    def run(self, max_turns: int = 100_000) -> None:
        """Until nothing is left to do."""
        for _ in range(max_turns):
            if not self.turn():
                return
        raise AssertionError("the workers do not come to rest")

    def generate(self, prompts: list[list[int]], **kwargs: object) -> list[list[int]]:
        """Run prompts together; returns each one's tokens."""
        tickets = [self.submit(prompt, **kwargs) for prompt in prompts]  # type: ignore[arg-type]
        self.run()
        return [self.outputs[ticket].tokens[0] for ticket in tickets]

    def close(self) -> None:
        for node in self.nodes.values():
            node.close()

    def _receive(self, message: Message) -> None:
        match message:
            case Update():
                for child in message.children:
                    output = self.outputs[child.ticket]
                    assert child.index not in output.finish, "a token after the end"
                    assert child.index not in output.moved, "a token after it was moved"
                    output.tokens.setdefault(child.index, []).extend(child.tokens)
                    output.logprobs.setdefault(child.index, []).extend(child.logprobs or [])
                    if child.finish is not None:
                        output.finish[child.index] = child.finish
                for moved in message.moved:
                    assert moved.index not in self.outputs[moved.ticket].moved
                    self.outputs[moved.ticket].moved[moved.index] = moved
                for part in message.prompt_logprobs:
                    self._logprobs(self.outputs[part.ticket], part)
                for usage in message.usages:
                    assert self.outputs[usage.ticket].usage is None, "usage twice"
                    self.outputs[usage.ticket].usage = usage
                for stage in message.stages:
                    self.outputs[stage.ticket].stages.append(stage.name)
            case Refused():
                self.outputs[message.ticket].refused = message

    @staticmethod
    def _logprobs(output: Output, part: PromptLogprobs) -> None:
        # By position, as the gateway does: a prompt that gave its blocks up is computed, and told of, again.
        start = part.first - 1
        assert start <= len(output.prompt_logprobs)
        output.prompt_logprobs[start : start + len(part.values)] = part.values
