"""`python -m tandem.bench.kernels linear | moe`: kernels of a decode step with every plan worth trying, on one GPU.

Weights rotate, so that none is found in the L2 cache. Each plan's calls are one CUDA graph, replayed in turns with all
others; a figure is the median of its turns. Every result is compared with float64. Prints JSON lines, and then a table
of the best plans beside those that `kernels.small_linear.PLANS`, `moe_few.PLANS` and `moe_sorted.TILES` name.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.errors import ConfigError
from ..engine.kv_cache import TORCH_DTYPES
from ..engine.models.spec import ModelSpec, MoeSpec, parse_spec, read_spec
from ..kernels import activation, linear, moe_few, moe_sorted, on_gpu, small_linear
from ..kernels.moe_sorted import Tile as GroupTile
from ..kernels.small_linear import Gemv, Tile
from .machine import describe

MODELS: dict[str, dict[str, Any]] = {
    "qwen3-8b": {
        "architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 40960, "dtype": "bfloat16",
    },
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 40960, "dtype": "bfloat16", "num_experts": 128,
        "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True,
    },
}  # fmt: skip
"""Sizes of models that need no folder."""

_ROUNDS = 9
_MIN_GRAPH_US = 400
_MAX_ERROR = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
_L2_TIMES = 3
"""How much more than the L2 cache the weights take that rotate."""

_GEMV_SHAPES = {
    1: [(2, 2048, 4), (4, 1024, 4), (2, 1024, 4), (1, 2048, 4), (8, 1024, 4), (2, 2048, 8), (4, 2048, 8), (4, 512, 2)],
    2: [(2, 1024, 4), (4, 1024, 4), (2, 2048, 8), (4, 512, 2)],
    4: [(1, 1024, 4), (2, 1024, 4), (4, 1024, 4), (2, 512, 2)],
}
"""Rows of x of a program → rows, depth and warps. Elements of a row are in order when depth is 256 · warps."""

_TILES = {
    16: [
        Tile(16, 128, 1, 4, 5, False), Tile(16, 256, 1, 4, 4, False), Tile(32, 128, 1, 4, 4, False),
        Tile(32, 256, 1, 4, 4, False), Tile(64, 128, 1, 4, 4, False), Tile(64, 128, 1, 4, 4, True),
        Tile(64, 256, 1, 4, 3, True), Tile(128, 64, 1, 4, 6, True),
    ],
    64: [
        Tile(32, 128, 1, 4, 4, False), Tile(32, 256, 1, 4, 3, False), Tile(64, 128, 1, 4, 4, False),
        Tile(64, 64, 1, 4, 6, True), Tile(64, 128, 1, 4, 4, True), Tile(128, 64, 1, 4, 5, True),
        Tile(128, 128, 1, 8, 3, True),
    ],
}  # fmt: skip
"""Up to so many rows of x → tiles, without splits."""

_FEW = [
    moe_few.Plan(8, 4, 1024, 4, 1, 4, 256, 4, 1),
    moe_few.Plan(8, 8, 1024, 4, 1, 4, 256, 4, 1),
    moe_few.Plan(8, 2, 1024, 4, 1, 4, 256, 4, 1),
    moe_few.Plan(4, 8, 1024, 4, 1, 4, 256, 4, 1),
    moe_few.Plan(8, 4, 512, 2, 1, 4, 256, 4, 1),
    moe_few.Plan(8, 4, 1024, 4, 3, 4, 256, 4, 1),
    moe_few.Plan(8, 4, 1024, 4, 1, 1, 256, 1, 1),
    moe_few.Plan(8, 4, 1024, 4, 1, 2, 256, 2, 1),
    moe_few.Plan(8, 4, 1024, 4, 1, 4, 256, 4, 3),
    moe_few.Plan(8, 4, 1024, 4, 1, 8, 256, 8, 1),
]

_GROUPED = [
    moe_sorted.Entry(8, GroupTile(16, 32, 128, 4, 3), GroupTile(16, 64, 64, 4, 5)),
    moe_sorted.Entry(8, GroupTile(16, 32, 256, 4, 3), GroupTile(16, 64, 64, 4, 5)),
    moe_sorted.Entry(8, GroupTile(16, 32, 128, 4, 4), GroupTile(16, 64, 128, 4, 3)),
    moe_sorted.Entry(8, GroupTile(16, 16, 256, 4, 3), GroupTile(16, 32, 128, 4, 4)),
    moe_sorted.Entry(8, GroupTile(16, 64, 128, 4, 3), GroupTile(16, 32, 256, 4, 3)),
    moe_sorted.Entry(8, GroupTile(16, 32, 128, 2, 4), GroupTile(16, 64, 128, 2, 4)),
]


class Product(NamedTuple):
    """A product of a model's layers: ``outputs`` rows of the weight, gate and up together if ``gated``."""

    name: str
    outputs: int
    inputs: int
    gated: bool = False


class Figure(NamedTuple):
    """One plan's result: None where it failed."""

    plan: str
    us: float | None
    error: float | None
    failed: str = ""


def products(spec: ModelSpec, ranks: int) -> list[Product]:
    """The products of a decode step, as each of ``ranks`` ranks of tensor parallelism computes them."""
    heads, kv_heads = spec.num_heads // ranks, max(1, spec.num_kv_heads // ranks)
    found = [
        Product("qkv", (heads + 2 * kv_heads) * spec.head_dim, spec.hidden),
        Product("o", spec.hidden, heads * spec.head_dim),
    ]
    if len(spec.moe_layers) < spec.num_layers:
        found += [
            Product("gate_up", 2 * spec.inner // ranks, spec.hidden, gated=True),
            Product("down", spec.hidden, spec.inner // ranks),
        ]
    if spec.moe is not None:
        found.append(Product("router", spec.moe.num_experts, spec.hidden))
    return [*found, Product("head", -(-spec.vocab_size // ranks), spec.hidden)]


def plans(product: Product, tokens: int, num_processors: int) -> list[Gemv | Tile]:
    """What may be fastest for ``tokens`` rows on so many processors."""
    found: list[Gemv | Tile] = []
    if tokens <= 4:
        together = 1 if tokens == 1 else 2 if tokens == 2 else 4
        found += [Gemv(together, *shape, 1) for shape in _GEMV_SHAPES[together]]
        found += [Gemv(together, *_GEMV_SHAPES[together][1], 3)]
    if product.outputs <= 1024 and tokens > 1:
        found += [Gemv(1, 1, 1024, 4, 1), Gemv(1, 1, 2048, 4, 1), Gemv(1, 2, 1024, 4, 1)]
    if tokens > 1:
        base = next(tiles for most, tiles in _TILES.items() if tokens <= most)
        for tile in base[2:6] if tokens <= 4 else base:
            blocks = product.outputs // tile.rows
            if 3 * blocks >= 2 * num_processors:
                found.append(tile)
            if blocks < num_processors:
                splits = max(2, min(16, round(2 * num_processors / max(blocks, 1))))
                found.append(tile._replace(splits=1 << (splits.bit_length() - 1)))
    return found


class Timer:
    """Replays graphs in turns.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self.l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size

    def record(self, calls: Sequence[Callable[[], Tensor]]) -> torch.cuda.CUDAGraph:
        """A graph of calls, the first of which has run before: kernels are compiled outside the recording."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            for call in calls:
                call()
        return graph

    def times_us(self, graphs: Sequence[torch.cuda.CUDAGraph]) -> list[float]:
        """Median time of each, in turns, none waiting for the host."""
        turns: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in graphs]
        for graph in graphs:
            graph.replay()
        for _ in range(_ROUNDS):
            for graph, events in zip(graphs, turns, strict=True):
                start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                graph.replay()
                stop.record()
                events.append((start, stop))
        torch.cuda.synchronize()
        return [1e3 * statistics.median(start.elapsed_time(stop) for start, stop in events) for events in turns]

    def copies(self, weight_bytes: int) -> int:
        """How many weights must rotate so that none is in the L2 cache when its turn comes."""
        return max(1, -(-_L2_TIMES * self.l2_bytes // weight_bytes))

    def compare(
        self, runs: dict[str, Callable[[int], Tensor]], num_calls: int, want: Tensor, limit: float
    ) -> list[Figure]:
        """Figures of all runs, each of which computes call ``i``; call 0 must give ``want`` but for ``limit``."""
        figures, graphs = {}, {}
        self._pool = torch.cuda.graph_pool_handle()  # one whose graphs are all gone cannot be used again
        for name, run in runs.items():
            try:
                got = run(0).double()
                error = float((got - want).norm() / want.norm())
                if not error <= limit:
                    figures[name] = Figure(name, None, error, "wrong")
                    continue
                graphs[name] = self.record([functools.partial(run, i) for i in range(num_calls)])
                figures[name] = Figure(name, None, error)
            except (on_gpu.triton.TritonError, RuntimeError) as failure:
                figures[name] = Figure(name, None, None, f"{type(failure).__name__}: {str(failure)[:200]}")
        for name, us in zip(graphs, self.times_us(list(graphs.values())), strict=True):
            figures[name] = figures[name]._replace(us=us / num_calls)
        return list(figures.values())


def _random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda").normal_(std=scale)


def _exact_product(x: Tensor, weight: Tensor, gated: bool) -> Tensor:
    """In float64, some rows of the weight at a time."""
    full = torch.cat([x.double() @ rows.double().T for rows in weight.split(8192)], dim=1)
    return activation.reference(full) if gated else full


def linear_figures(
    shapes: Sequence[Product], tokens: Sequence[int], dtype: torch.dtype, timer: Timer, num_processors: int
) -> Iterator[tuple[Product, int, str, list[Figure]]]:
    """For each product and number of tokens: the table's plan, and all figures; cuBLAS is the first."""
    for shape in shapes:
        weight_bytes = shape.outputs * shape.inputs * dtype.itemsize
        scale = shape.inputs**-0.5
        copies = timer.copies(weight_bytes)
        weights = [_random(shape.outputs, shape.inputs, dtype=dtype, scale=scale) for _ in range(copies)]
        enough = -(-_MIN_GRAPH_US // max(1, weight_bytes // 3_000_000))
        num_calls = -(-min(512, max(2, enough)) // copies) * copies
        for count in tokens:
            x = _random(count, shape.inputs, dtype=dtype)

            def library(i: int, x: Tensor = x, shape: Product = shape, weights: list[Tensor] = weights) -> Tensor:
                out = linear.reference(x, weights[i % len(weights)])
                return activation.fused(out) if shape.gated else out

            def planned(
                plan: Gemv | Tile, i: int, x: Tensor = x, shape: Product = shape, weights: list[Tensor] = weights
            ) -> Tensor:
                return small_linear.multiply(x, weights[i % len(weights)], None, plan, shape.gated)

            chosen = small_linear.plan_for(x, weights[0])
            tried = dict.fromkeys([*([chosen] if chosen else []), *plans(shape, count, num_processors)])
            runs: dict[str, Callable[[int], Tensor]] = {"cuBLAS": library}
            runs |= {_text(plan): functools.partial(planned, plan) for plan in tried}
            want = _exact_product(x, weights[0], shape.gated)
            yield shape, count, _text(chosen), timer.compare(runs, num_calls, want, _MAX_ERROR[dtype])


def moe_figures(
    spec: ModelSpec, moe: MoeSpec, ranks: int, tokens: Sequence[int], dtype: torch.dtype, timer: Timer
) -> Iterator[tuple[Product, int, str, list[Figure]]]:
    """As `linear_figures`, for the whole mixture; the sorted way with its table's tiles is the first.

    Routing is uniform, with logits a quarter apart: no rounding changes it.
    """
    hidden, inner, experts = spec.hidden, moe.inner // ranks, moe.num_experts
    num_calls = 8
    layers = [
        (
            _random(experts, 2 * inner, hidden, dtype=dtype, scale=hidden**-0.5),
            _random(experts, hidden, inner, dtype=dtype, scale=inner**-0.5),
        )
        for _ in range(max(2, timer.copies(3 * moe.top_k * inner * hidden * dtype.itemsize) // experts))
    ]
    for count in tokens:
        rows = num_calls * count
        if rows > hidden:
            raise ConfigError(f"{count} tokens are too many for a hidden size of {hidden}", fix="give fewer --tokens")
        basis = torch.linalg.qr(_random(hidden, rows, dtype=torch.float64)).Q.T.contiguous()
        order = torch.stack([torch.randperm(experts, device="cuda") for _ in range(rows)]).double() - experts / 2
        router = (order.T / 4 @ basis / hidden**0.5).to(dtype).contiguous()
        xs = (basis * hidden**0.5).to(dtype).view(num_calls, count, hidden)
        touched = order.view(num_calls, count, experts).topk(moe.top_k).indices.flatten(1).tolist()
        distinct = sum(len(set(chosen)) for chosen in touched) / num_calls
        fixed = moe.top_k, moe.renormalize

        def run(
            way: Callable[..., Tensor],
            plan: Any,
            i: int,
            xs: Tensor = xs,
            router: Tensor = router,
            fixed: tuple[int, bool] = fixed,
        ) -> Tensor:
            return way(xs[i], router, *layers[i % len(layers)], *fixed, plan)

        runs: dict[str, Callable[[int], Tensor]] = {"sorted": functools.partial(run, moe_sorted.fused, None)}
        chosen = "sorted"
        pairs = count * moe.top_k
        if experts <= moe_few.MAX_EXPERTS and pairs <= moe_few.PLANS[-1].max_pairs:
            runs["few"] = functools.partial(run, moe_few.fused, None)
            chosen = "few" if moe_few.serves(count, experts, moe.top_k) else chosen
            runs |= {f"few {_text(plan)}": functools.partial(run, moe_few.fused, plan) for plan in _FEW}
        runs |= {f"sorted {_text(entry)}": functools.partial(run, moe_sorted.fused, entry) for entry in _GROUPED}
        want = _exact_moe(xs[0], router, *layers[0], *fixed)
        # As many rows of weights as the touched experts have.
        shape = Product("moe", round(distinct * 3 * inner), hidden)
        yield shape, count, chosen, timer.compare(runs, num_calls, want, _MAX_ERROR[dtype])


def _exact_moe(x: Tensor, router: Tensor, gate_up: Tensor, down: Tensor, top_k: int, renormalize: bool) -> Tensor:
    """In float64, an expert at a time."""
    wide = x.double()
    weights, experts = torch.softmax(wide @ router.double().T, dim=-1).topk(top_k, dim=-1)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    out = torch.zeros_like(wide)
    for expert in experts.unique().tolist():
        token, choice = (experts == expert).nonzero(as_tuple=True)
        inner = activation.reference(wide[token] @ gate_up[expert].double().T)
        out.index_add_(0, token, inner @ down[expert].double().T * weights[token, choice].unsqueeze(1))
    return out


def _text(plan: Any) -> str:
    """A plan as the tables write it: ``Gemv(1, 2, 2048, 4, 1)``."""
    if plan is None:
        return "cuBLAS"
    inside = ", ".join(_text(value) if isinstance(value, tuple) else str(value) for value in plan)
    return f"{type(plan).__name__}({inside})"


def summary(rows: Sequence[tuple[Product, int, str, list[Figure]]], itemsize: int) -> list[str]:
    """A line for each product and number of tokens: the baseline, the table's plan, and the best."""
    lines = [f"{'product':>8} {'tokens':>6} {'baseline':>16} {'table':>16} {'best':>16}  x     plan"]
    for shape, count, chosen, figures in rows:
        good = {figure.plan: figure.us for figure in figures if figure.us is not None}
        if not good:
            lines.append(f"{shape.name:>8} {count:>6} every plan failed")
            continue
        size = shape.outputs * shape.inputs * itemsize

        def shown(us: float | None, size: int = size) -> str:
            return f"{'failed':>16}" if us is None else f"{us:8.2f}us {size / us / 1e3:5.0f}"

        best = min(good, key=lambda plan: good[plan])
        base = good.get(figures[0].plan)
        ratio = f"{base / good[best]:.3f}" if base else "  -  "
        lines.append(
            f"{shape.name:>8} {count:>6} {shown(base)} {shown(good.get(chosen))} {shown(good[best])}  {ratio} {best}"
            + (" (the table's)" if best == chosen else f", table: {chosen}")
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print. Blocks for a few minutes.

    Raises:
        ConfigError: no CUDA device or Triton is here, or the model does not divide or has no experts.
    """
    parser = argparse.ArgumentParser(prog="python -m tandem.bench.kernels", description=__doc__)
    parser.add_argument("operation", choices=["linear", "moe"])
    parser.add_argument("--model", help=f"a folder with a config.json, or one of {', '.join(MODELS)}")
    parser.add_argument("--tp", type=int, default=1, help="ranks of tensor parallelism")
    parser.add_argument("--tokens", type=int, nargs="+", help="rows of x")
    parser.add_argument("--only", nargs="+", help="these products alone, for example: qkv o")
    parser.add_argument("--dtype", choices=sorted(TORCH_DTYPES), default="bfloat16")
    options = parser.parse_args(arguments)
    model = options.model or ("qwen3-8b" if options.operation == "linear" else "qwen3-30b-a3b")
    spec = parse_spec(MODELS[model], {}, model) if model in MODELS else read_spec(Path(model).expanduser())
    if spec.num_heads % options.tp or spec.inner % options.tp:
        raise ConfigError(
            f"--tp: {options.tp} ranks cannot share {spec.num_heads} heads and {spec.inner} inner columns"
        )
    if options.operation == "moe" and spec.moe is None:
        raise ConfigError(f"{model} has no experts", fix="--model qwen3-30b-a3b")
    if not torch.cuda.is_available() or not on_gpu.AVAILABLE:
        raise ConfigError("kernels are measured on a GPU, and no CUDA device with Triton is here")
    device, dtype = torch.device("cuda", torch.cuda.current_device()), TORCH_DTYPES[options.dtype]
    start_s = time.perf_counter()
    torch.manual_seed(0)
    timer, num_processors = Timer(device), on_gpu.num_processors(device)
    machine = describe() | {"device": torch.cuda.get_device_name(device), "triton": on_gpu.triton.__version__}
    print(json.dumps({"bench": "kernels", "options": vars(options) | {"model": model}, "machine": machine}))
    if options.operation == "linear":
        wanted = [shape for shape in products(spec, options.tp) if not options.only or shape.name in options.only]
        tokens = options.tokens or [1, 2, 4, 8, 16, 32, 64]
        measured = linear_figures(wanted, tokens, dtype, timer, num_processors)
    else:
        assert spec.moe is not None
        measured = moe_figures(spec, spec.moe, options.tp, options.tokens or [1, 2, 4, 8, 16, 32], dtype, timer)
    rows = []
    with torch.inference_mode():
        for shape, count, chosen, figures in measured:
            rows.append((shape, count, chosen, figures))
            size = shape.outputs * shape.inputs * dtype.itemsize
            for figure in figures:
                rate = {} if figure.us is None else {"gb_per_s": round(size / figure.us / 1e3)}
                print(json.dumps({**shape._asdict(), "tokens": count, **figure._asdict(), **rate}), flush=True)
    print(json.dumps({"seconds": round(time.perf_counter() - start_s, 1)}))
    print("\n".join(summary(rows, dtype.itemsize)))


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        raise SystemExit(f"tandem: {error}") from None
