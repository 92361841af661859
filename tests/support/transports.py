"""What the transports' tests share: which can be tried here, and plans of ranges."""

from __future__ import annotations

import numpy as np
import pytest
from tandem.core.errors import ConfigError
from tandem.kv_transfer.layout import Runs, coalesce
from tandem.kv_transfer.transports import PREFERENCE
from tandem.kv_transfer.transports.nixl import load_nixl
from tandem.kv_transfer.transports.ucx import load_ucx

SIZE = 1 << 16
PEER = "prefill-0#1"
NAMES = PREFERENCE
PARAMS = [pytest.param(name, marks=pytest.mark.ucx) if name == "ucx" else name for name in NAMES]


def missing(name: str) -> str:
    """Why a transport cannot be tried here, or ""."""
    try:
        {"nixl": load_nixl, "ucx": load_ucx}.get(name, lambda: None)()
    except ConfigError as error:
        return str(error)
    return ""


def runs(*pieces: tuple[int, int, int]) -> Runs:
    columns = np.array(pieces, np.int64).reshape(-1, 3)
    return coalesce(columns[:, 0], columns[:, 1], columns[:, 2])


def scattered(rng: np.random.Generator, count: int, size: int, total: int = SIZE) -> Runs:
    slots = total // size
    return coalesce(
        rng.permutation(slots)[:count] * size, rng.permutation(slots)[:count] * size, np.full(count, size, np.int64)
    )
