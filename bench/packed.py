"""`python -m tandem.bench.packed`: products with quantised weights, on one GPU: how fast their bytes arrive.

Measured as `tandem.bench.kernels` does, beside the same product in the inputs' type by cuBLAS. Prints JSON lines, and
then a table of the best plans beside those that `kernels.packed_linear` and `moe_packed` name, and what share of the
memory's rate they reach. Other processes compile the kernels first, as there are many.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.errors import ConfigError
from ..engine.models.spec import ModelSpec, parse_spec
from ..kernels import linear, moe, moe_packed, on_gpu, packed_linear, packed_quads
from ..kernels.moe_packed import ByColumns, ByRows
from ..kernels.moe_sorted import Entry
from ..kernels.moe_sorted import Tile as GroupTile
from ..kernels.packed_linear import Gemv, Plan, QuadTile, Tile
from ..kernels.schemes.awq import Awq
from ..kernels.schemes.fp8 import Fp8, Fp8Weight
from ..kernels.schemes.gptq import Gptq
from ..kernels.schemes.mxfp4 import Mxfp4, Mxfp4Weight
from ..kernels.schemes.packed import Packed, Scheme
from .kernels import MODELS, Figure, Product, Timer, products, summary
from .machine import describe

SCHEMES: dict[str, Scheme] = {
    "fp8-blocks": Fp8("block", (128, 128), "group"),
    "fp8-rows": Fp8("channel"),
    "gptq": Gptq(128, True, False, scale_dtype=torch.float16),
    "gptq-order": Gptq(128, False, True, scale_dtype=torch.float16),
    "awq": Awq(128, torch.float16),
    "mxfp4": Mxfp4(),
}

_MODELS: dict[str, dict[str, Any]] = {
    **MODELS,
    "gpt-oss-20b": {
        "architectures": ["GptOssForCausalLM"], "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880,
        "num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "dtype": "bfloat16", "num_local_experts": 32,
        "num_experts_per_tok": 4, "sliding_window": 128,
    },
}  # fmt: skip

_MAX_ERROR = 2e-2
_TOKENS = [1, 2, 4, 8, 16, 32, 64]
_MEMORY_BYTES_PER_S = 3.0e12
"""What an H100 reads at most."""
_MOE_CALLS = 8
_COMPILERS = 12

_GROUPED = [
    Entry(1 << 40, GroupTile(rows, columns, depth, warps, 3), GroupTile(rows, columns, depth, warps, 3))
    for rows, columns, depth, warps in (
        (16, 32, 64, 4), (16, 32, 128, 4), (16, 64, 128, 4), (16, 64, 128, 8), (32, 64, 128, 4), (64, 64, 64, 4),
        (64, 128, 64, 8),
    )
]  # fmt: skip

_QUAD_GATE_UP: list[GroupTile] = [
    ByColumns(16, 32, 128, 4, 3), ByColumns(16, 32, 128, 4, 4), ByColumns(16, 16, 128, 4, 4),
    ByColumns(16, 32, 128, 2, 4), ByColumns(16, 64, 64, 4, 3), ByColumns(16, 32, 64, 4, 4), ByColumns(16, 32, 64, 8, 3),
    ByRows(16, 64, 128, 4, 4), ByRows(16, 64, 256, 4, 3), ByRows(16, 128, 128, 4, 3), ByRows(16, 128, 128, 8, 3),
    ByRows(16, 128, 256, 8, 3),
]  # fmt: skip
_QUAD_DOWN: list[GroupTile] = [
    ByColumns(16, 32, 64, 4, 3), ByColumns(16, 32, 64, 4, 4), ByColumns(16, 64, 64, 4, 3), ByColumns(16, 64, 128, 2, 3),
    ByColumns(16, 32, 128, 2, 3), ByColumns(16, 128, 64, 4, 3), ByRows(16, 64, 128, 4, 4), ByRows(16, 64, 256, 4, 3),
    ByRows(16, 128, 128, 4, 3), ByRows(16, 128, 128, 4, 5), ByRows(16, 128, 256, 4, 3), ByRows(16, 256, 128, 8, 3),
]  # fmt: skip
"""Each is tried with the first of the others, and then the best of both together."""

_BY_ROWS = (
    (64, 128, 4, 4), (64, 256, 4, 3), (128, 128, 4, 3), (128, 128, 4, 5), (128, 256, 4, 3), (256, 128, 8, 3),
    (256, 128, 8, 4),
)  # fmt: skip
_QUADS = {
    16: (
        [
            (32, 128, 4, 3), (32, 128, 4, 4), (64, 64, 4, 3), (64, 64, 4, 5), (64, 128, 4, 3), (64, 128, 4, 4),
            (128, 64, 4, 3), (64, 128, 2, 4), (32, 128, 2, 5), (64, 64, 8, 3),
        ],
        _BY_ROWS,
    ),
    32: ([(32, 64, 4, 3), (32, 64, 4, 4), (64, 64, 4, 3), (32, 128, 4, 3), (32, 64, 8, 3)], _BY_ROWS),
    64: ([], _BY_ROWS),
}  # fmt: skip
"""Up to how many rows of inputs → rows, depth, warps and stages, by columns and by rows."""


def plans(tokens: int) -> list[Plan]:
    """What may be fastest for so many rows of inputs, whatever the weight."""
    found: list[Plan] = []
    if tokens <= 4:
        together = min(tokens, 2)
        sizes = ((2, 1024, 4), (4, 512, 4), (4, 1024, 4), (8, 512, 4), (16, 256, 4), (8, 1024, 8))
        found += [Gemv(together, *size) for size in sizes]
    rows = max(16, on_gpu.next_power_of_2(tokens))
    shapes = ((16, 128, 4), (32, 128, 4), (64, 64, 4), (64, 128, 4), (128, 64, 8))
    return [*found, *(Tile(rows, n, depth, splits, warps, 3) for n, depth, warps in shapes for splits in (1, 4))]


def quad_plans(tokens: int, outputs: int, inputs: int, num_processors: int) -> list[Plan]:
    """Likewise for a weight of four bits that `packed_quads` serves: with as many splits as keep so many processors
    busy."""
    found: list[Plan] = []
    most = next((most for most in _QUADS if tokens <= most), None)
    if most is None:
        return found
    for by_columns, shapes in zip((True, False), _QUADS[most], strict=True):
        for rows, depth, warps, stages in shapes:
            steps = inputs // (depth * warps if by_columns else depth)
            for splits in (1, 2, 4, 8, 16):
                warps_each = -(-outputs // rows) * splits * warps / num_processors
                if splits <= max(1, steps) and (4 <= warps_each <= 20 or (splits == 1 and warps_each > 20)):
                    plan = QuadTile(most, rows, depth, by_columns, splits, warps, stages, 8)
                    found += [plan, plan._replace(ahead=0)] if (rows, depth, warps) in _BOTH_AHEAD else [plan]
    return found


_BOTH_AHEAD = ((64, 128, 4), (128, 128, 4))
"""Tried without asking for memory ahead too."""


def random_weight(scheme: Scheme, parts: Sequence[int], columns: int, device: torch.device, *leading: int) -> Packed:
    """Random bits with scales that make products of a size of about one."""
    weight = scheme.allocate(
        lambda shape, dtype: torch.empty((*leading, *shape), dtype=dtype, device=device), parts, columns, columns
    )
    if isinstance(weight, Fp8Weight):
        weight.codes.copy_(torch.randn(weight.codes.shape, dtype=torch.float16, device=device))
        weight.scales.fill_(columns**-0.5)
        return weight
    weight.codes.random_(0, 256)
    if isinstance(weight, Mxfp4Weight):
        weight.scales.random_(119, 122)
        return weight
    weight.scales.fill_(0.2 * columns**-0.5)
    tensors = weight.tensors()
    if "zeros" in tensors:
        tensors["zeros"].random_(0, 16)
    if "groups" in tensors:
        group_size = columns // weight.scales.shape[-1]
        tensors["groups"].copy_(torch.randperm(columns, device=device) // group_size)
    return weight


def linear_figures(
    scheme: Scheme, shapes: Sequence[Product], tokens: Sequence[int], timer: Timer, device: torch.device
) -> Iterator[tuple[Product, int, int, str, list[Figure]]]:
    """Each product and number of tokens, the weight's bytes, the table's plan, and all figures; cuBLAS is the first."""
    for shape in shapes:
        first = random_weight(scheme, [shape.outputs], shape.inputs, device)
        copies = timer.copies(first.nbytes)
        weights = [first, *(random_weight(scheme, [shape.outputs], shape.inputs, device) for _ in range(copies - 1))]
        plain = [weight.dequantize(torch.bfloat16) for weight in weights]
        num_calls = -(-16 // copies) * copies
        for count in tokens:
            x = torch.randn(count, shape.inputs, device=device).bfloat16()

            def library(i: int, x: Tensor = x, plain: list[Tensor] = plain) -> Tensor:
                return linear.reference(x, plain[i % len(plain)])

            def planned(plan: Plan, i: int, x: Tensor = x, weights: list[Packed] = weights) -> Tensor:
                return packed_linear.multiply(x, weights[i % len(weights)], None, plan)

            quads = packed_quads.serves(first)
            chosen = packed_linear.plan_of(x, first)
            tried: list[Plan] = [chosen, packed_linear.plan_for(count, shape.outputs, x.dtype), *plans(count)]
            if quads:
                tried[2:] = quad_plans(count, shape.outputs, shape.inputs, on_gpu.num_processors(device))
            runs: dict[str, Callable[[int], Tensor]] = {"cuBLAS": library}
            runs |= {repr(plan): functools.partial(planned, plan) for plan in dict.fromkeys(tried)}
            want = x.double() @ plain[0].double().T
            yield shape, count, first.nbytes, repr(chosen), timer.compare(runs, num_calls, want, _MAX_ERROR)


def moe_figures(
    scheme: Scheme, spec: ModelSpec, tokens: Sequence[int], timer: Timer, device: torch.device
) -> Iterator[tuple[Product, int, int, str, list[Figure]]]:
    """As `linear_figures`, for a mixture whose tokens are spread evenly; bytes are those of the experts they touch."""
    assert spec.moe is not None
    experts, top_k, inner, hidden = spec.moe.num_experts, spec.moe.top_k, spec.moe.inner, spec.hidden
    gate_up, down = _experts(scheme, spec, device)
    fixed = gate_up, down, top_k, spec.moe.renormalize
    quads = packed_quads.serves(gate_up) and packed_quads.serves(down)
    for count in tokens:
        # Each call has tokens of its own, so that their experts are not in the L2 cache.
        rows = _MOE_CALLS * count
        basis = torch.linalg.qr(torch.randn(hidden, rows, dtype=torch.float64, device=device)).Q.T.contiguous()
        order = torch.stack([torch.randperm(experts, device=device) for _ in range(rows)]).double() - experts / 2
        router = (order.T / 4 @ basis / hidden**0.5).bfloat16().contiguous()
        xs = (basis * hidden**0.5).bfloat16().view(_MOE_CALLS, count, hidden)
        chosen = order.view(_MOE_CALLS, count, experts).topk(top_k).indices.flatten(1).tolist()
        touched = sum(len(set(ids)) for ids in chosen) / _MOE_CALLS

        def run(entry: Entry | None, i: int, xs: Tensor = xs, router: Tensor = router) -> Tensor:
            return moe_packed.fused(xs[i], router, *fixed, entry)

        runs: dict[str, Callable[[int], Tensor]] = {"table": functools.partial(run, None)}
        entries = moe_entries(quads)
        runs |= {repr(entry): functools.partial(run, entry) for entry in entries}
        want = moe.reference(xs[0], router, *fixed).double()
        figures = timer.compare(runs, _MOE_CALLS, want, _MAX_ERROR)
        if quads:
            best = together(entries, {figure.plan: figure.us for figure in figures if figure.us is not None})
            figures += timer.compare({repr(best): functools.partial(run, best)}, _MOE_CALLS, want, _MAX_ERROR)
        shape = Product("moe", round(3 * inner * touched), hidden)
        nbytes = round((gate_up.nbytes + down.nbytes) * touched / experts)
        yield shape, count, nbytes, "table", figures


def moe_entries(quads: bool) -> list[Entry]:
    """What may be fastest for a mixture; ``quads``: of weights that `packed_quads` serves."""
    if not quads:
        return _GROUPED
    most = 1 << 40
    pairs = [(tile, _QUAD_DOWN[0]) for tile in _QUAD_GATE_UP] + [(_QUAD_GATE_UP[0], tile) for tile in _QUAD_DOWN[1:]]
    return [_GROUPED[1], *(Entry(most, *pair) for pair in pairs)]


def together(entries: Sequence[Entry], us: dict[str, float]) -> Entry:
    """The best tile for gate and up with the best for down, of entries of which each has one of its own."""
    good = [entry for entry in entries if repr(entry) in us and isinstance(entry.gate_up, ByColumns | ByRows)]
    if not good:
        return entries[0]

    def best(other: GroupTile, part: int) -> GroupTile:
        own = [entry for entry in good if entry[3 - part] is other] or good
        tile = min(own, key=lambda entry: us[repr(entry)])[part]
        assert isinstance(tile, GroupTile)
        return tile

    return Entry(1 << 40, best(_QUAD_DOWN[0], 1), best(_QUAD_GATE_UP[0], 2))


def compile_some(operation: str, scheme_name: str, model: str, tokens: Sequence[int], part: int) -> None:
    """Run one of `_COMPILERS` parts of the kernels once, so that they are on disk."""
    device, scheme, spec = torch.device("cuda", torch.cuda.current_device()), SCHEMES[scheme_name], _spec(model)
    shape = next(shape for shape in products(spec, 1) if shape.name == "o")
    todo: list[Callable[[], Tensor]] = []
    if operation == "linear":
        weight = random_weight(scheme, [shape.outputs], shape.inputs, device)
        wanted: dict[Plan, int] = {}
        for other in _measured(spec):
            for count in tokens:
                for plan in quad_plans(count, other.outputs, other.inputs, on_gpu.num_processors(device)):
                    # Sums of splits are another kernel than results, however many there are.
                    wanted[plan._replace(splits=min(plan.splits, 2)) if isinstance(plan, QuadTile) else plan] = count
        for plan, count in wanted.items():
            x = torch.randn(count, shape.inputs, device=device).bfloat16()
            todo.append(functools.partial(packed_linear.multiply, x, weight, None, plan))
    else:
        assert spec.moe is not None
        gate_up, down = _experts(scheme, spec, device)
        x, router = (torch.randn(n, spec.hidden, device=device).bfloat16() for n in (1, spec.moe.num_experts))
        for entry in moe_entries(True):
            todo.append(functools.partial(moe_packed.fused, x, router, gate_up, down, spec.moe.top_k, True, entry))
    for run in todo[part::_COMPILERS]:
        try:
            run()
        except (on_gpu.triton.TritonError, RuntimeError):
            continue  # whoever measures it says so


def _compile_all(operation: str, scheme_name: str, model: str, tokens: Sequence[int]) -> None:
    """By this very command, which then measures nothing. One that fails leaves its part to the measurement."""
    command = [sys.executable, "-m", "tandem.bench.packed", operation, "--scheme", scheme_name, "--model", model]
    command += ["--tokens", *map(str, tokens), "--compile-part"]
    for child in [subprocess.Popen([*command, str(part)]) for part in range(_COMPILERS)]:
        child.wait()


def shares(rows: Sequence[tuple[Product, int, int, list[Figure]]]) -> list[str]:
    """A line for each product and number of tokens: the best plan, and its share of the memory's rate."""
    lines = []
    for shape, count, nbytes, figures in rows:
        packed = [figure for figure in figures if figure.us is not None and figure.plan != "cuBLAS"]
        best = min(packed, key=lambda figure: figure.us or 0.0, default=None)
        if best is not None and best.us is not None:
            rate = nbytes / best.us * 1e6
            share = f"{rate / 1e9:5.0f} GB/s, {rate / _MEMORY_BYTES_PER_S:4.0%}"
            lines.append(f"{shape.name:>8} {count:>6} {best.us:8.2f}us {share}  {best.plan}")
    return lines


def _spec(model: str) -> ModelSpec:
    return parse_spec(_MODELS[model], {}, model)


def _measured(spec: ModelSpec) -> list[Product]:
    return [shape for shape in products(spec, 1) if shape.name not in ("router", "head")]


def _experts(scheme: Scheme, spec: ModelSpec, device: torch.device) -> tuple[Packed, Packed]:
    assert spec.moe is not None
    experts, inner, hidden = spec.moe.num_experts, spec.moe.inner, spec.hidden
    gate_up = random_weight(scheme, [inner] * 2, hidden, device, experts)
    return gate_up, random_weight(scheme, [hidden], inner, device, experts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print.

    Raises:
        ConfigError: no GPU, or nothing to measure.
    """
    parser = argparse.ArgumentParser(prog="python -m tandem.bench.packed", description=__doc__)
    parser.add_argument("operation", choices=["linear", "moe"])
    parser.add_argument("--scheme", choices=SCHEMES, default="mxfp4")
    parser.add_argument("--model", choices=_MODELS)
    parser.add_argument("--tokens", type=int, nargs="+", default=_TOKENS)
    parser.add_argument("--compile-part", type=int, help=f"compile one of {_COMPILERS} parts, and measure nothing")
    options = parser.parse_args(arguments)
    model = options.model or ("qwen3-8b" if options.operation == "linear" else "qwen3-30b-a3b")
    spec, scheme = _spec(model), SCHEMES[options.scheme]
    if options.operation == "moe" and spec.moe is None:
        raise ConfigError(f"{model} has no experts", fix="--model qwen3-30b-a3b")
    if not torch.cuda.is_available() or not on_gpu.AVAILABLE:
        raise ConfigError("kernels are measured on a GPU, and no CUDA device with Triton is here")
    if options.compile_part is not None:
        compile_some(options.operation, options.scheme, model, options.tokens, options.compile_part)
        return
    device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(0)
    print(json.dumps({"bench": "packed", "options": vars(options) | {"model": model}, "machine": describe()}))
    timer, start_s = Timer(device), time.perf_counter()
    if packed_quads.serves(random_weight(scheme, [16], 256, device)):
        _compile_all(options.operation, options.scheme, model, options.tokens)
        print(json.dumps({"compiled_s": round(time.perf_counter() - start_s, 1)}), flush=True)
    if options.operation == "linear":
        measured = linear_figures(scheme, _measured(spec), options.tokens, timer, device)
    else:
        measured = moe_figures(scheme, spec, options.tokens, timer, device)
    rows, bare = [], []
    with torch.inference_mode():
        for shape, count, nbytes, chosen, figures in measured:
            # The table's GB/s are of the packed bytes, also for cuBLAS, which reads more.
            rows.append((shape._replace(outputs=nbytes, inputs=1), count, chosen, figures))
            bare.append((shape, count, nbytes, figures))
            for figure in figures:
                rate = {} if figure.us is None else {"gb_per_s": round(nbytes / figure.us / 1e3)}
                print(json.dumps({**shape._asdict(), "tokens": count, **figure._asdict(), **rate}), flush=True)
    print(json.dumps({"seconds": round(time.perf_counter() - start_s, 1)}))
    print("\n".join([*summary(rows, 1), "", *shares(bare)]))


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        raise SystemExit(f"tandem: {error}") from None
