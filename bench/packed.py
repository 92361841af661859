"""`python -m tandem.bench.packed`: products with quantised weights, on one GPU: how fast their bytes arrive.

Measured as `tandem.bench.kernels` does, beside the same product in the inputs' type by cuBLAS. Prints JSON lines, and
then a table of the best plans beside those that `kernels.packed_linear.PLANS` and `moe_packed.TILES` name.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..core.errors import ConfigError
from ..engine.models.spec import ModelSpec, parse_spec
from ..kernels import linear, moe, moe_packed, on_gpu, packed_linear
from ..kernels.moe_sorted import Entry
from ..kernels.moe_sorted import Tile as GroupTile
from ..kernels.packed_linear import Gemv, Tile
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

_MAX_ERROR = 2e-2
_TOKENS = [1, 2, 4, 8, 16, 32, 64]
_GROUPED = [
    Entry(1 << 40, GroupTile(rows, columns, depth, warps, 3), GroupTile(rows, columns, depth, warps, 3))
    for rows, columns, depth, warps in (
        (16, 32, 64, 4), (16, 32, 128, 4), (16, 64, 128, 4), (16, 64, 128, 8), (32, 64, 128, 4), (64, 64, 64, 4),
        (64, 128, 64, 8),
    )
]  # fmt: skip


def plans(tokens: int) -> list[Gemv | Tile]:
    """What may be fastest for so many rows of inputs."""
    found: list[Gemv | Tile] = []
    if tokens <= 4:
        together = min(tokens, 2)
        sizes = ((2, 1024, 4), (4, 512, 4), (4, 1024, 4), (8, 512, 4), (16, 256, 4), (8, 1024, 8))
        found += [Gemv(together, *size) for size in sizes]
    rows = max(16, on_gpu.next_power_of_2(tokens))
    shapes = ((16, 128, 4), (32, 128, 4), (64, 64, 4), (64, 128, 4), (128, 64, 8))
    return [*found, *(Tile(rows, n, depth, splits, warps, 3) for n, depth, warps in shapes for splits in (1, 4))]


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

            def planned(plan: Gemv | Tile, i: int, x: Tensor = x, weights: list[Packed] = weights) -> Tensor:
                return packed_linear.multiply(x, weights[i % len(weights)], None, plan)

            chosen = packed_linear.plan_for(count, shape.outputs, x.dtype)
            runs: dict[str, Callable[[int], Tensor]] = {"cuBLAS": library}
            runs |= {repr(plan): functools.partial(planned, plan) for plan in dict.fromkeys([chosen, *plans(count)])}
            want = x.double() @ plain[0].double().T
            yield shape, count, first.nbytes, repr(chosen), timer.compare(runs, num_calls, want, _MAX_ERROR)


def moe_figures(
    scheme: Scheme, spec: ModelSpec, tokens: Sequence[int], timer: Timer, device: torch.device
) -> Iterator[tuple[Product, int, int, str, list[Figure]]]:
    """As `linear_figures`, for a mixture whose tokens are spread evenly; bytes are those of the experts they touch."""
    assert spec.moe is not None
    experts, top_k, inner, hidden = spec.moe.num_experts, spec.moe.top_k, spec.moe.inner, spec.hidden
    gate_up = random_weight(scheme, [inner] * 2, hidden, device, experts)
    down = random_weight(scheme, [hidden], inner, device, experts)
    fixed = gate_up, down, top_k, spec.moe.renormalize
    for count in tokens:
        basis = torch.linalg.qr(torch.randn(hidden, count, dtype=torch.float64, device=device)).Q.T.contiguous()
        order = torch.stack([torch.randperm(experts, device=device) for _ in range(count)]).double() - experts / 2
        router = (order.T / 4 @ basis / hidden**0.5).bfloat16().contiguous()
        x = (basis * hidden**0.5).bfloat16()
        touched = len(order.topk(top_k).indices.unique())

        def run(entry: Entry | None, i: int, x: Tensor = x, router: Tensor = router) -> Tensor:
            return moe_packed.fused(x, router, *fixed, entry)

        runs: dict[str, Callable[[int], Tensor]] = {"table": functools.partial(run, None)}
        runs |= {repr(e): functools.partial(run, e) for e in _GROUPED}
        want = moe.reference(x, router, *fixed).double()
        shape = Product("moe", 3 * inner * touched, hidden)
        nbytes = (gate_up.nbytes + down.nbytes) * touched // experts
        yield shape, count, nbytes, "table", timer.compare(runs, 4, want, _MAX_ERROR)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print.

    Raises:
        ConfigError: no GPU, or nothing to measure.
    """
    parser = argparse.ArgumentParser(prog="python -m tandem.bench.packed", description=__doc__)
    parser.add_argument("operation", choices=["linear", "moe"])
    parser.add_argument("--scheme", choices=SCHEMES, default="mxfp4")
    parser.add_argument("--model", choices=MODELS)
    parser.add_argument("--tokens", type=int, nargs="+", default=_TOKENS)
    options = parser.parse_args(arguments)
    model = options.model or ("qwen3-8b" if options.operation == "linear" else "qwen3-30b-a3b")
    spec, scheme = parse_spec(MODELS[model], {}, model), SCHEMES[options.scheme]
    if options.operation == "moe" and spec.moe is None:
        raise ConfigError(f"{model} has no experts", fix="--model qwen3-30b-a3b")
    if not torch.cuda.is_available() or not on_gpu.AVAILABLE:
        raise ConfigError("kernels are measured on a GPU, and no CUDA device with Triton is here")
    device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(0)
    print(json.dumps({"bench": "packed", "options": vars(options) | {"model": model}, "machine": describe()}))
    timer = Timer(device)
    if options.operation == "linear":
        shapes = [shape for shape in products(spec, 1) if shape.name not in ("router", "head")]
        measured = linear_figures(scheme, shapes, options.tokens, timer, device)
    else:
        measured = moe_figures(scheme, spec, options.tokens, timer, device)
    rows = []
    with torch.inference_mode():
        for shape, count, nbytes, chosen, figures in measured:
            # The table's GB/s are of the packed bytes, also for cuBLAS, which reads more.
            rows.append((shape._replace(outputs=nbytes, inputs=1), count, chosen, figures))
            for figure in figures:
                rate = {} if figure.us is None else {"gb_per_s": round(nbytes / figure.us / 1e3)}
                print(json.dumps({**shape._asdict(), "tokens": count, **figure._asdict(), **rate}), flush=True)
    print("\n".join(summary(rows, 1)))


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        raise SystemExit(f"tandem: {error}") from None
