"""Prometheus metrics: every name, label and bucket in one place.

Each process has one `CollectorRegistry`; workers send theirs as text to the gateway, which serves all under one path
with a ``worker`` label (`merge`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from .tally import Tally
from .urgency import LEVELS, level_of

if TYPE_CHECKING:
    from prometheus_client import Metric

_LATENCY_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_BYTES = tuple(4.0**power for power in range(5, 18))
_RUNS = tuple(4.0**power for power in range(11))
_GB_PER_S = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 20, 30, 50, 100, 200, 400)
_STALL_S = (0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.1, 1)
_STEP_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)


def _spans(registry: CollectorRegistry) -> Counter:
    return Counter("tandem_spans", "Spans of traced requests by what became of them", ["outcome"], registry=registry)


class WorkerMetrics:
    """What prefill, decode and colocated workers count."""

    def __init__(self, registry: CollectorRegistry) -> None:
        r = registry
        self.registry = registry
        self.blocks = Gauge("tandem_kv_blocks", "KV blocks by state", ["state"], registry=r)
        self.running = Gauge("tandem_sequences_running", "Sequences that take part in steps", registry=r)
        self.waiting = Gauge("tandem_sequences_waiting", "Sequences that wait for room or for KV", registry=r)
        self.step_s = Histogram("tandem_step_seconds", "One engine step", ["kind"], buckets=_STEP_S, registry=r)
        self.forward_s = Histogram(
            "tandem_step_forward_seconds", "The model's part of a step", ["kind"], buckets=_STEP_S, registry=r
        )
        self.prompt_tokens = Counter("tandem_prompt_tokens", "Prompt tokens computed", registry=r)
        self.cached_tokens = Counter("tandem_cached_tokens", "Prompt tokens found in the prefix cache", registry=r)
        self.output_tokens = Counter("tandem_output_tokens", "Tokens sampled", registry=r)
        self.invalid_logits = Counter(
            "tandem_invalid_logits", "Sequences failed because the model's output was not a number", registry=r
        )
        self.preemptions = Counter("tandem_preemptions", "Sequences that gave their blocks back", registry=r)
        self.aborts = Counter("tandem_aborts", "Sequences aborted by the client", ["state"], registry=r)
        self.spans = _spans(r)
        self.leases = Gauge("tandem_leases", "Leases held", registry=r)
        self.lease_events = Counter("tandem_lease_events", "Leases by what became of them", ["event"], registry=r)
        self.handoffs = Counter("tandem_handoffs", "Handoffs by outcome", ["outcome"], registry=r)
        self.load_failures = Counter(
            "tandem_kv_load_failures", "KV that was not delivered or failed its check", ["reason"], registry=r
        )
        self.transfer_bytes = Counter("tandem_transfer_bytes", "KV bytes read", ["transport", "peer"], registry=r)
        self.transfer_size_bytes = Histogram(
            "tandem_transfer_size_bytes", "KV bytes of one read", ["transport", "peer"], buckets=_BYTES, registry=r
        )
        self.transfer_runs = Histogram(
            "tandem_transfer_runs",
            "Contiguous runs of one read, a descriptor each",
            ["transport", "peer"],
            buckets=_RUNS,
            registry=r,
        )
        self.transfer_s = Histogram(
            "tandem_transfer_seconds",
            "One read, from submission to landing",
            ["transport", "peer"],
            buckets=_LATENCY_S,
            registry=r,
        )
        self.hidden_state_files = Counter(
            "tandem_hidden_state_files", "Files of hidden states by what became of them", ["outcome"], registry=r
        )
        self.transfer_gb_per_s = Histogram(
            "tandem_transfer_gigabytes_per_second",
            "Rate of one read, from submission to landing",
            ["transport", "peer"],
            buckets=_GB_PER_S,
            registry=r,
        )
        self.transfer_hidden_s = Histogram(
            "tandem_transfer_hidden_seconds",
            "Time of a handoff with reads on their way while its prompt was being computed",
            buckets=_LATENCY_S,
            registry=r,
        )
        self.transfer_unhidden_s = Histogram(
            "tandem_transfer_unhidden_seconds",
            "Time of a handoff from its prompt's end to its last byte",
            buckets=_LATENCY_S,
            registry=r,
        )
        self.offload_slots = Gauge(
            "tandem_offload_slots", "Blocks that a tier has room for, and holds", ["tier", "state"], registry=r
        )
        self.offload_away = Gauge(
            "tandem_offload_away", "Whether a tier answers nothing at present", ["tier"], registry=r
        )
        self.offload_blocks = Counter(
            "tandem_offload_blocks", "Blocks of a tier by what became of them", ["tier", "event"], registry=r
        )
        self.offload_lookups = Counter(
            "tandem_offload_lookups", "Blocks of prompts that a tier was asked for", ["tier"], registry=r
        )
        self.offload_hits = Counter(
            "tandem_offload_hits", "Blocks of prompts that a tier was asked for, and had", ["tier"], registry=r
        )
        self.offload_bytes = Counter(
            "tandem_offload_bytes", "KV bytes that a tier gave and took", ["tier", "direction"], registry=r
        )
        self.offload_copy_s = Counter(
            "tandem_offload_copy_seconds",
            "Time with loads from, or stores to, a tier under way",
            ["tier", "direction"],
            registry=r,
        )
        self.offload_oldest_at_s = Gauge(
            "tandem_offload_oldest_timestamp_seconds",
            "When the oldest block of a tier was stored",
            ["tier"],
            registry=r,
        )
        self.offload_failures = Counter(
            "tandem_offload_failures",
            "Blocks that a tier did not store, or lost, by cause",
            ["tier", "cause"],
            registry=r,
        )
        self.offload_loads = Counter(
            "tandem_offload_loads",
            "Prompts of which tiers had a part, by what became of it; declined: computing is sooner",
            ["outcome"],
            registry=r,
        )
        self.offload_tokens = Counter(
            "tandem_offload_tokens", "Tokens whose KV tiers gave to the prefix cache", registry=r
        )
        self.bad_frames = Counter("tandem_bad_frames", "Frames refused", ["socket"], registry=r)

    def transferred(self, transport: str, peer: str, num_bytes: int, num_runs: int, seconds: float) -> None:
        """A read of KV has landed."""
        self.transfer_bytes.labels(transport, peer).inc(num_bytes)
        self.transfer_size_bytes.labels(transport, peer).observe(num_bytes)
        self.transfer_runs.labels(transport, peer).observe(num_runs)
        self.transfer_s.labels(transport, peer).observe(seconds)
        if seconds > 0:
            self.transfer_gb_per_s.labels(transport, peer).observe(num_bytes / seconds / 1e9)


class ExpertMetrics:
    """What a rank counts that moves experts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        r = registry
        self.registry = registry
        self.attempts = Counter("tandem_expert_rebalances", "Rebalances by outcome", ["outcome"], registry=r)
        self.balancedness = Gauge(
            "tandem_expert_balancedness",
            "Mean over the fullest rank: as counted over the window (now), and of the newest plan (predicted)",
            ["when"],
            registry=r,
        )
        self.placed_at_s = Gauge(
            "tandem_expert_placement_timestamp_seconds", "Since when experts are where they are", registry=r
        )
        self.replicas = Gauge("tandem_expert_replicas", "The most slots that one expert has", registry=r)
        self.moved = Counter("tandem_experts_moved", "Experts that came into a slot of this rank", registry=r)
        self.moved_bytes = Counter("tandem_expert_bytes", "Bytes of experts read from peers", registry=r)
        self.stage_s = Histogram(
            "tandem_expert_stage_seconds",
            "Reading a plan (plan), staging a layer (stage), and its wait for all ranks (hand_over)",
            ["stage"],
            buckets=_LATENCY_S,
            registry=r,
        )
        self.stall_s = Histogram(
            "tandem_expert_stall_seconds",
            "Between two steps: agreeing on experts, and swapping them in",
            buckets=_STALL_S,
            registry=r,
        )


class GatewayMetrics:
    """What a gateway counts, per request."""

    def __init__(self, registry: CollectorRegistry) -> None:
        r = registry
        self.registry = registry
        self.requests = Counter("tandem_requests", "Requests answered", ["endpoint", "status"], registry=r)
        self.in_flight = Gauge("tandem_requests_in_flight", "Requests being served", registry=r)
        self.prompt_tokens = Counter("tandem_request_prompt_tokens", "Prompt tokens of requests", registry=r)
        self.output_tokens = Counter("tandem_request_output_tokens", "Tokens sent to clients", registry=r)
        self.ttft_s = Histogram("tandem_ttft_seconds", "Time to first token", buckets=_LATENCY_S, registry=r)
        self.itl_s = Tally("tandem_itl_seconds", "Time between tokens", _STEP_S, r)
        self.e2e_s = Histogram("tandem_e2e_seconds", "Request to last token", buckets=_LATENCY_S, registry=r)
        self.stage_s = Histogram(
            "tandem_stage_seconds",
            "Stages of a request: queue, prefill, transfer, decode",
            ["stage"],
            buckets=_LATENCY_S,
            registry=r,
        )
        self.queue_s = Histogram(
            "tandem_queue_seconds",
            "Until a worker began a request's prompt, by priority: high (below 0), normal, low",
            ["priority"],
            buckets=_LATENCY_S,
            registry=r,
        )
        self.displaced = Counter(
            "tandem_displaced", "Requests that gave their place in the gateway to more urgent ones", registry=r
        )
        self.replays = Counter("tandem_replays", "Requests replayed on another worker", registry=r)
        self.spans = _spans(r)
        self.moves = Counter("tandem_moves", "Outputs that went on on another worker with their KV", registry=r)
        self.members = Gauge("tandem_members", "Live workers", ["role"], registry=r)
        self.worker_up = Gauge(
            "tandem_worker_up",
            "Whether a worker's metrics are in this answer: it gave them in time",
            ["worker"],
            registry=r,
        )
        self.bad_frames = Counter("tandem_bad_frames", "Frames refused", ["socket"], registry=r)

    def queued(self, priority: int, seconds: float) -> None:
        """A worker has begun a request's prompt."""
        self.queue_s.labels(LEVELS[level_of(priority)]).observe(seconds)


class SupervisorMetrics:
    """What a node's supervisor says of its ranks, beside what these say themselves."""

    def __init__(self, registry: CollectorRegistry) -> None:
        r = registry
        self.registry = registry
        place = ["pool", "worker", "rank"]
        self.ready = Gauge("tandem_rank_ready", "Whether a rank serves and gets on", place, registry=r)
        self.stalled_s = Gauge(
            "tandem_rank_stalled_seconds", "How long a rank has had work and taken no step", place, registry=r
        )
        self.restarts = Gauge("tandem_rank_restarts", "Lives of a rank that have ended", place, registry=r)

    def clear(self) -> None:
        """Forget all ranks: those that are gone are not told for ever."""
        for metric in (self.ready, self.stalled_s, self.restarts):
            metric.clear()


class _Families:
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterator[Metric]:
        yield from self._families


def render(registry: CollectorRegistry) -> str:
    """A registry in Prometheus' text format."""
    return generate_latest(registry).decode()


def merge(texts: Mapping[str, str], labels: Mapping[str, Mapping[str, str]] | None = None) -> str:
    """One exposition of several processes', each sample with its ``worker`` label.

    Args:
        texts: worker name → text as `render` makes it.
        labels: worker name → its labels, where they are others.
    """
    families: dict[str, Metric] = {}
    for worker, text in texts.items():
        added = {"worker": worker} if labels is None else labels[worker]
        for family in text_string_to_metric_families(text):
            merged = families.setdefault(family.name, family)
            samples = [s._replace(labels={**added, **s.labels}) for s in family.samples]
            if merged is family:
                family.samples = samples
            else:
                merged.samples.extend(samples)
    registry = CollectorRegistry()
    registry.register(_Families(families.values()))
    return render(registry)
