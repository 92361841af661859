"""A gateway's dispatcher without sockets: workers are what a test says they are."""

from __future__ import annotations

from prometheus_client import CollectorRegistry
from tandem.cluster.gateway.dispatcher import Dispatcher
from tandem.cluster.gateway.live import LiveRequest
from tandem.cluster.gateway.timeline import Timelines
from tandem.cluster.router import Router
from tandem.core.clock import ManualClock
from tandem.core.config import GatewayConfig
from tandem.core.ids import PeerId
from tandem.core.messages import (
    Child,
    ChildUpdate,
    FinishReason,
    Generate,
    Member,
    Membership,
    Message,
    Report,
    Sampling,
    Stopping,
    Update,
)
from tandem.core.metrics import GatewayMetrics


class Gateway:
    """A dispatcher whose workers are a list of what was sent to them."""

    def __init__(self, max_queued: int = 100) -> None:
        self.clock = ManualClock()
        self.router = Router("least_loaded")
        self.sent: list[tuple[PeerId, Message]] = []
        self.metrics = GatewayMetrics(CollectorRegistry())
        config = GatewayConfig(max_queued=max_queued, failover_timeout_s=0.05)
        self.dispatcher = Dispatcher(
            config, self.router, self.clock, self.metrics, lambda peer, message: self.sent.append((peer, message))
        )
        self.timelines = Timelines("gateway-0#1", self.clock)
        self.follow("decode-0#1", "prefill-0#1")

    def follow(self, *peers: str) -> None:
        self.dispatcher.follow(Membership(1, [Member(p, p.split("-")[0], "n", "tcp://x:1") for p in peers]))
        for peer in peers:
            if peer.startswith("decode"):
                prefills = [p for p in peers if p.startswith("prefill")]
                self.dispatcher.receive(peer, Report(0, 0, 0, 1, 1, peers=prefills))

    def submit(self, outputs: int = 1, prompt_logprobs: int = -1, priority: int = 0) -> LiveRequest:
        live = LiveRequest(
            "cmpl-1", [1, 2, 3], [Child(i, 10 + i) for i in range(outputs)], Sampling(), Stopping(8), prompt_logprobs, "",
            self.timelines.open("cmpl-1"), priority=priority,
        )  # fmt: skip
        self.dispatcher.submit(live)
        return live

    def generates(self) -> list[tuple[PeerId, Generate]]:
        return [(peer, message) for peer, message in self.sent if isinstance(message, Generate)]

    def tokens(
        self, ticket: int, index: int, *tokens: int, finish: FinishReason | None = None, peer: str = "decode-0#1"
    ) -> None:
        self.dispatcher.receive(peer, Update(children=[ChildUpdate(ticket, index, list(tokens), None, finish)]))

    def check_idle(self) -> None:
        assert self.dispatcher.num_live == 0
        assert self.dispatcher._by_ticket == {}
        assert self.dispatcher._homeless == {}
        assert not any(any(load.values()) for load in self.router._decode_load)
        assert not any(any(load.values()) for load in self.router._prefill_load)
