"""One picture of a sweep over offload configurations: what hits where, and cost against time to first token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError

_MOST_NAMES = 40


def require_matplotlib() -> Any:
    """Its pyplot, which draws into files.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("the plot needs matplotlib", fix="pip install 'tandem[bench]', or pass --no-plot") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot_tuning(records: Sequence[dict[str, Any]], most: float, title: str, path: Path) -> None:
    """Write a PNG.

    Args:
        records: of `kv_transfer.offload.sweep.record`, with ``name``, ``pareto`` and ``best``.
        most: hit rate of a cache without limit.
        title: above it.
        path: of the file.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    pyplot = require_matplotlib()
    ordered = sorted(records, key=lambda record: record["hit_rate"])[-_MOST_NAMES:]
    height = max(3.8, 1.6 + 0.26 * len(ordered))
    figure, (hits, times) = pyplot.subplots(1, 2, figsize=(14, height), layout="constrained")
    names = [record["name"] for record in ordered]
    left = [0.0] * len(ordered)
    for tier in dict.fromkeys(name for record in ordered for name in record["hit_rate_by_tier"]):
        rates = [100 * record["hit_rate_by_tier"].get(tier, 0.0) for record in ordered]
        hits.barh(range(len(ordered)), rates, 0.7, left=left, label=tier)
        left = [before + rate for before, rate in zip(left, rates, strict=True)]
    hits.axvline(100 * most, color="black", linewidth=0.8, linestyle="--", label="without limit")
    hits.set_yticks(range(len(ordered)), names, fontsize=7)
    hits.set_xlabel("prompt tokens found, %")
    hits.legend(fontsize=8)
    for percent, marker in (("p50", "o"), ("p90", "s")):
        values = [record[f"ttft_{percent}_s"] for record in records]
        times.plot([record["cost"] for record in records], values, marker, markersize=4, label=percent)
    front = sorted((record["cost"], record["ttft_p90_s"]) for record in records if record["pareto"])
    times.plot(*zip(*front, strict=True), "k-", linewidth=0.8, label="Pareto front of p90")
    [best] = [record for record in records if record["best"]]
    times.plot(best["cost"], best["ttft_p90_s"], "k*", markersize=12, label="best")
    times.set_xlabel("cost of the capacity")
    times.set_ylabel("time to first token, s")
    times.set_ylim(bottom=0)
    times.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
