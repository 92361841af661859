"""One picture of a recorded load of experts: each rank's load in each layer, before and after placing them by it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..eplb.balance import balancedness
from .plot_tuning import require_matplotlib


def plot_experts(before: NDArray[np.float64], after: NDArray[np.float64], title: str, path: Path) -> None:
    """Write a PNG.

    Args:
        before: [layers, ranks] load of ranks.
        after: likewise.
        title: above it.
        path: of the file.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    pyplot = require_matplotlib()
    num_layers, num_ranks = before.shape
    height = min(max(3.5, 1.8 + 0.12 * num_layers), 14)
    figure, axes = pyplot.subplots(1, 2, figsize=(min(max(8, 3 + 0.3 * num_ranks), 16), height), layout="constrained")
    # In units of the layer's mean, and one scale for both: what is dark on the left may be pale on the right.
    relative = [loads / np.maximum(loads.mean(-1, keepdims=True), 1e-300) for loads in (before, after)]
    top = max(1.01, *(float(values.max()) for values in relative))
    for name, loads, values, axis in zip(("before", "after"), (before, after), relative, axes, strict=True):
        image = axis.imshow(values, aspect="auto", interpolation="nearest", cmap="magma_r", vmin=0, vmax=top)
        axis.set_title(f"{name}: balancedness {balancedness(loads):.3f}", fontsize=10)
        axis.set_xlabel("rank")
        axis.set_ylabel("layer")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=axes, label="load ÷ mean of the layer's ranks")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
