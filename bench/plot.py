"""One picture of a comparison: TTFT, ITL, E2E and throughput by arm. Bars are medians of the runs, dots the runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from ..core.errors import ConfigError


def plot(records: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Write a PNG.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("the plot needs matplotlib", fix="pip install 'tandem[bench]', or pass --no-plot") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    arms = list(dict.fromkeys(record["arm"] for record in records))
    panels = [("ttft_s", "time to first token, ms"), ("itl_s", "time between tokens, ms"), ("e2e_s", "end to end, ms")]
    figure, axes = pyplot.subplots(1, 4, figsize=(15, 3.8), layout="constrained")
    for axis, (name, label) in zip(axes, panels, strict=False):
        for offset, arm in enumerate(arms):
            runs = [record[name] for record in records if record["arm"] == arm and name in record]
            if not runs:
                continue
            positions = [index + 0.8 * (offset + 0.5) / len(arms) - 0.4 for index in range(3)]
            values = [[run[percent] * 1e3 for run in runs] for percent in ("p50", "p90", "p99")]
            axis.bar(positions, [median(column) for column in values], 0.8 / len(arms), label=arm)
            for position, column in zip(positions, values, strict=True):
                axis.plot([position] * len(column), column, "k.", markersize=4)
        axis.set_xticks(range(3), ["p50", "p90", "p99"])
        axis.set_title(label, fontsize=10)
    axes[0].legend(fontsize=8)
    for index, arm in enumerate(arms):
        column = [record["output_tokens_per_s"] for record in records if record["arm"] == arm]
        axes[3].bar(index, median(column), 0.7)
        axes[3].plot([index] * len(column), column, "k.", markersize=4)
    axes[3].set_xticks(range(len(arms)), arms)
    axes[3].set_title("output tokens/s", fontsize=10)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
