"""`python -m tandem.bench.latents`: attention of prompts over latents, on one GPU, with every tile worth trying.

Measured as `tandem.bench.kernels` does, beside torch's. Prints JSON lines, and then the best tile of each chunk and
context, to be written into `kernels.latent_prefill.TILE`.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..core.errors import ConfigError
from ..kernels import latent_attention, latent_prefill, on_gpu
from ..kernels.latent_prefill import Tile
from ..kernels.prefill_attention import Span, Spans
from .kernels import Figure, Timer
from .machine import describe

RANK, ROPE, BLOCK_TOKENS = 512, 64, 16
"""Of DeepSeek-V2 and V3."""

_MAX_ERROR = 2e-2
_SCALE = 192**-0.5
_CHUNKS = ((512, 512), (2048, 2048), (2048, 8192), (4096, 4096))
"""New tokens, and all of the context."""
TILES = [
    Tile(64, 32, 8, 2), Tile(64, 32, 8, 3), Tile(64, 64, 8, 2), Tile(64, 64, 8, 3), Tile(64, 16, 8, 4),
    Tile(32, 32, 4, 2), Tile(32, 32, 4, 3), Tile(32, 64, 4, 3), Tile(32, 64, 8, 3), Tile(16, 64, 4, 3),
]  # fmt: skip


def operations(heads: int, tokens: int, context: int) -> int:
    """Of both products, of the pairs that see each other, a multiplication and an addition counting as two."""
    pairs = tokens * context - tokens * (tokens - 1) // 2
    return 2 * heads * pairs * (2 * RANK + ROPE)


def figures(heads: int, tokens: int, context: int, timer: Timer, device: torch.device) -> list[Figure]:
    """Torch's, and each tile's."""
    blocks = -(-context // BLOCK_TOKENS)
    cache = torch.randn(blocks, 1, 1, 1, BLOCK_TOKENS, RANK + ROPE, device=device).bfloat16()
    q = torch.randn(tokens, heads, RANK + ROPE, device=device).bfloat16()
    spans = Spans.of([Span(0, tokens, torch.randperm(blocks, device=device), context)])

    def library(_: int) -> Tensor:
        return latent_attention.reference_prefill(q, cache, 0, spans, _SCALE, RANK)

    def fused(tile: Tile, _: int) -> Tensor:
        return latent_prefill.fused(q, cache, 0, spans, _SCALE, RANK, tile)

    want = latent_attention.reference_prefill(q.float(), cache, 0, spans, _SCALE, RANK).double()
    runs: dict[str, Callable[[int], Tensor]] = {"torch": library}
    runs |= {repr(tile): functools.partial(fused, tile) for tile in TILES}
    return timer.compare(runs, 1, want, _MAX_ERROR)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print. Blocks for a minute.

    Raises:
        ConfigError: no GPU.
    """
    parser = argparse.ArgumentParser(prog="python -m tandem.bench.latents", description=__doc__)
    parser.add_argument("--heads", type=int, default=16, help="of a rank: 16 of V3 over 8")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() or not on_gpu.AVAILABLE:
        raise ConfigError("kernels are measured on a GPU, and no CUDA device with Triton is here")
    device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(0)
    print(json.dumps({"bench": "latents", "options": vars(options), "machine": describe()}))
    timer, lines = Timer(device), []
    with torch.inference_mode():
        for tokens, context in _CHUNKS:
            count = operations(options.heads, tokens, context)
            found = figures(options.heads, tokens, context, timer, device)
            for figure in found:
                rate = {} if figure.us is None else {"tflops": round(count / figure.us / 1e6)}
                print(json.dumps({"tokens": tokens, "context": context, **figure._asdict(), **rate}), flush=True)
            good = [figure for figure in found if figure.us is not None]
            for figure in sorted(good, key=lambda figure: figure.us or 0.0)[:3]:
                assert figure.us is not None
                rates = f"{figure.us:10.1f}us {count / figure.us / 1e6:5.0f} TFLOPS"
                lines.append(f"{tokens:>6} of {context:>6} {rates}  {figure.plan}")
    print("\n".join(lines))


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        raise SystemExit(f"tandem: {error}") from None
