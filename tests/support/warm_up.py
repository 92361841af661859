"""A first start of a worker of the demo model, for what it leaves on disk: compiled kernels."""

from __future__ import annotations

import torch
from tandem.core.config import Config
from tandem.engine.build import build_engine, warm_up


def main() -> None:
    """Warm an engine up, as a worker does. Blocks for most of a minute where nothing is compiled yet."""
    config = Config.model_validate({"kv": {"capacity": "64MiB"}})
    engine = build_engine(config, 64, torch.device("cpu"), lambda *_: None).engine
    warm_up(engine, 2048, lambda *_: None)
