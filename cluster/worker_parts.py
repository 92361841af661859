"""What a worker is made of: its engine and the ranks behind it, its sockets, transports and tiers, and what serves."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..core.clock import Clock
from ..core.config import ColocatedPool, Config, DecodePool, PrefillPool
from ..core.ids import PeerId, index_of, worker_of
from ..core.log import logger
from ..core.messages import Message
from ..core.metrics import ExpertMetrics, WorkerMetrics
from ..core.tracer import open_tracer
from ..core.wire import ClusterKeys, SecureContext
from ..decode.worker import DecodeWorker
from ..engine.build import use_threads, warm_up
from ..engine.engine import Engine
from ..engine.expert_balancer import Balancer
from ..engine.expert_parallel import ExpertPlace, open_rendezvous
from ..engine.kv_control import KVControl
from ..engine.models.shard import kv_heads_of
from ..engine.offloader import Offloader
from ..engine.open_balancer import open_balancer
from ..engine.rank_wire import PeerAccess
from ..engine.ranks import Ranks, build_on_ranks
from ..engine.tiers import Tiers, open_tiers, whole_layout
from ..kv_transfer.connector import Connector
from ..kv_transfer.ends import End, first_end, open_transports
from ..kv_transfer.hidden_states import open_writer
from ..kv_transfer.offload.build import Place
from ..kv_transfer.offload.network import Network, Servers
from ..prefill.worker import PrefillWorker
from .expert_worker import Legacy, prepare
from .kv_publisher import KVPublisher
from .mesh import Mesh


class WorkerParts:
    """Makes all of it; blocks while the model is read. Belongs to the engine thread.

    The mesh is left for the owner to start, when it can answer.

    Args:
        peer: who we are.
        role: prefill, decode or colocated.
        config: what it means for the role's pool.
        keys: the cluster's.
        address: this node's address, where peers reach us.
        metrics: of the worker.
        clock: tells the time.
        progress: told how the start goes on, for people.
        host_tier: called with the bytes of a block, where a host tier is configured: where the node's is found.
        host_tiers: of other nodes.
        meet: see `WorkerRuntime`.
        note: told, on any thread, what operators want to know.
        legacy: of the workers that shared experts before this one and its group.
        nudge: called on any thread when a read or a tier has news.
        on_message: called on the mesh's thread with each message and its sender.
        on_lost: called on the mesh's thread with each peer that is gone.

    Raises:
        TandemError: the worker cannot serve as configured. Ranks have been ended.
    """

    def __init__(
        self,
        peer: PeerId,
        role: str,
        config: Config,
        keys: ClusterKeys,
        address: str,
        metrics: WorkerMetrics,
        clock: Clock,
        progress: Callable[[str], None],
        host_tier: Callable[[int], Path],
        host_tiers: Servers,
        meet: Callable[[str], str],
        note: Callable[[str], object],
        legacy: Legacy,
        nudge: Callable[[], None],
        on_message: Callable[[PeerId, Message], None],
        on_lost: Callable[[PeerId], None],
    ) -> None:
        self._peer = peer
        self._role = role
        self._config = config
        self._keys = keys
        self._address = address
        self._metrics = metrics
        self._clock = clock
        self._progress = progress
        self._host_tier = host_tier
        self._host_tiers = host_tiers
        self._meet = meet
        self._note = note
        self._legacy = legacy
        self._nudge = nudge
        self._ranks: Ranks | None = None
        try:
            self._build(on_message, on_lost)
        except BaseException:
            self._end_ranks()
            raise

    def close(self) -> None:
        """End all of it. Blocks until its threads and processes have ended."""
        self.connector.close()
        if self.balancer is not None:
            self.balancer.close()
        if isinstance(self.worker, PrefillWorker):
            self.worker.close()
        if self._hidden_states is not None:
            self._hidden_states.close()
        self.mesh.close()
        if self._tracer is not None:
            self._tracer.close()
        self.offloader.close()
        self.engine.cache.close()
        self._end_ranks()
        self._context.close()

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _build(self, on_message: Callable[[PeerId, Message], None], on_lost: Callable[[PeerId], None]) -> None:
        config, role, metrics, clock = self._config, self._role, self._metrics, self._clock
        pool: PrefillPool | DecodePool | ColocatedPool | None = getattr(config.pools, role)
        assert pool is not None
        self._tracer = open_tracer(self._peer, role, config.observability.traces, metrics.spans)
        self._progress("reading the model")
        threads = pool.threads or os.cpu_count() or 1
        built, self._ranks = build_on_ranks(
            config,
            pool,
            threads,
            lambda what, done: self._progress(f"{what} {done:.0%}"),
            self._expert_place(),
        )
        if self._ranks is not None:
            self._ranks.watch(self._rank_lost)
        use_threads(built.engine, threads)
        warm_up(built.engine, pool.max_batched_tokens, lambda what, done: self._progress(f"{what} {done:.0%}"))
        self.engine = built.engine
        self._context = SecureContext(self._keys, metrics.bad_frames.labels("denied").inc)
        self.mesh = Mesh(
            self._peer, self._context, self._address, on_message, on_lost, metrics.bad_frames.labels("mesh").inc
        )
        self.connector = self._connect(built.engine, built.fingerprint)
        model = built.engine.model
        self._hidden_states = open_writer(config.hidden_states, model.spec.hidden, model.dtype, metrics)
        tiers = self._open_tiers(built.engine)
        self.offloader = Offloader[Any](built.engine, tiers, clock, metrics)
        stack = None if tiers is None else tiers.stack
        self.publisher = KVPublisher(
            built.engine.pool, stack, built.fingerprint, built.engine.block_tokens, clock, self.mesh.send
        )
        self.control = KVControl(built.engine.pool, self.offloader, built.fingerprint, built.engine.block_tokens, clock)
        self.worker: PrefillWorker | DecodeWorker
        if isinstance(pool, PrefillPool):
            self.worker = PrefillWorker(
                built.engine,
                self.connector,
                pool,
                built.fingerprint,
                config.kv.lease_s,
                built.max_model_len,
                clock,
                metrics,
                self.mesh.send,
                self._hidden_states,
                self.offloader,
                self._tracer,
            )
        else:
            self.worker = DecodeWorker(
                built.engine,
                self.connector,
                pool,
                config,
                built.fingerprint,
                built.max_model_len,
                clock,
                metrics,
                self.mesh.send,
                self._hidden_states,
                self.offloader,
                self._tracer,
            )
        experts = built.engine.model.experts
        if experts is not None:
            prepare(experts, config)
        built.engine.runner.serve()
        self.balancer: Balancer | None = None
        if experts is not None:
            if self._ranks is not None:
                self._ranks.balance(PeerAccess(self._keys, self._address))
            self.balancer = open_balancer(
                experts,
                config,
                self._context,
                self._address,
                metrics.bad_frames.labels("experts").inc,
                ExpertMetrics(metrics.registry),
                clock,
                self._note,
                self._legacy.keep,
            )

    def _expert_place(self) -> ExpertPlace | None:
        """Consecutive workers of a pool share experts."""
        size = self._config.expert_parallel(self._role)
        if size == 1:
            return None
        return ExpertPlace(
            index_of(worker_of(self._peer)) % size,
            size,
            lambda: self._meet(open_rendezvous(self._address)),
            learned=self._legacy.learned(),
        )

    def _open_tiers(self, engine: Engine) -> Tiers | None:
        pools = self._config.pools
        sizes = {"prefill": pools.prefill, "decode": pools.decode, "colocated": pools.colocated}
        workers = frozenset(
            f"{role}-{number}" for role, pool in sizes.items() if pool is not None for number in range(pool.replicas)
        )
        has_host = any(tier.kind == "host" for tier in self._config.offload.tiers)
        folder = self._host_tier(whole_layout(engine).block_bytes) if has_host else Path()
        network = Network(self._context, self._address, self._config.kv, self._host_tiers, folder.name)
        place = Place(folder, worker_of(self._peer), len(workers), self._keys.server_public.hex(), network, workers)
        others: Sequence[np.ndarray | int] = ()
        if self._ranks is not None and self._config.offload.tiers:
            others = self._ranks.memory("offload.tiers")
        return open_tiers(self._config, engine, place, self._clock, self._nudge, others)

    def _end_ranks(self) -> None:
        if self._ranks is not None:
            self._ranks.close()

    def _rank_lost(self, rank: int) -> None:
        logger.error("rank %d of %s has ended; the process ends", rank, self._peer)
        os._exit(70)

    def _connect(self, engine: Engine, fingerprint: str) -> Connector:
        layout, kv = engine.cache.layout, self._config.kv
        return Connector(
            self._peer,
            fingerprint,
            layout,
            engine.groups,
            engine.runner.layer_groups,
            self._ends(engine),
            kv.transport,
            kv.lease_s,
            self._clock,
            self._metrics,
            kv.checksums,
            self._nudge,
        )

    def _ends(self, engine: Engine) -> list[End]:
        """Every rank's side of the byte plane, this one's first."""
        cache, spec, num_ranks = engine.cache, engine.model.spec, engine.model.group.size
        heads = [kv_heads_of(spec, rank, num_ranks) for rank in range(num_ranks)]
        if self._role == "colocated":
            return [first_end(heads[0], {}, cache.blocks, cache.generations_buffer)]
        kv, bad_frame = self._config.kv, self._metrics.bad_frames.labels("kv").inc
        transports, missing = open_transports(self._nudge, self._context, self._address, cache.blocks, kv, bad_frame)
        ends = [first_end(heads[0], transports, cache.blocks, cache.generations_buffer, missing)]
        if self._ranks is not None:
            access = PeerAccess(self._keys, self._address)
            others = self._ranks.transports(access, self._nudge, bad_frame)
            blocks: Sequence[np.ndarray | int | None] = [None] * len(others)
            if kv.checksums:
                blocks = self._ranks.memory("kv.checksums")
            ends += [
                End(held, moving, cache.blocks.kind, memory)
                for held, moving, memory in zip(heads[1:], others, blocks, strict=True)
            ]
        return ends
