"""One tier's numbers in a worker's metrics."""

from __future__ import annotations

from ...core.kv_messages import KVReport
from ...core.metrics import WorkerMetrics
from .base import TierStats

_EVENTS = ("stored", "loaded", "evicted", "refused")


class Published:
    """Keeps what it looked up by labels, which takes longer than all the rest, and what it told last: counters grow by
    the difference.

    Args:
        tier: its name, a label.
        metrics: the worker's.
    """

    def __init__(self, tier: str, metrics: WorkerMetrics) -> None:
        self._slots = metrics.offload_slots.labels(tier, "all")
        self._used = metrics.offload_slots.labels(tier, "used")
        self._away = metrics.offload_away.labels(tier)
        self._oldest_at_s = metrics.offload_oldest_at_s.labels(tier)
        self._of_stats = {event: metrics.offload_blocks.labels(tier, event) for event in _EVENTS}
        self._of_report = {
            "lookups": metrics.offload_lookups.labels(tier),
            "hits": metrics.offload_hits.labels(tier),
            "loaded_bytes": metrics.offload_bytes.labels(tier, "load"),
            "stored_bytes": metrics.offload_bytes.labels(tier, "store"),
            "load_s": metrics.offload_copy_s.labels(tier, "load"),
            "store_s": metrics.offload_copy_s.labels(tier, "store"),
        }
        self._tier = tier
        self._failures = metrics.offload_failures
        self._told: dict[str, float] = {}

    def publish(self, stats: TierStats, report: KVReport) -> None:
        """Bring all numbers up to date."""
        self._slots.set(stats.num_slots)
        self._used.set(stats.num_used)
        self._away.set(bool(stats.away))
        self._oldest_at_s.set(report.oldest_at_s)
        for event, counter in self._of_stats.items():
            counter.inc(self._more(event, getattr(stats, event)))
        for field, counter in self._of_report.items():
            counter.inc(self._more(field, getattr(report, field)))
        for cause, count in stats.failures.items():
            self._failures.labels(self._tier, cause).inc(self._more("!" + cause, count))

    def _more(self, name: str, value: float) -> float:
        more = max(value - self._told.get(name, 0), 0)
        self._told[name] = value
        return more
