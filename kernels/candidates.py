"""Which entries of a row may be drawn: min_p (Nguyen et al. 2024, arXiv:2407.01082), top_k (Fan et al. 2018,
arXiv:1805.04833) and top_p, the nucleus (Holtzman et al. 2020, arXiv:1904.09751).

Each filter keeps a prefix of the same order, value descending and id ascending, so that what all of them keep is one
prefix too, and its last entry says everything: kept is what is greater, or equal and of no greater id.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .on_gpu import kernel, kernel_varying, tl

_TILE = 4096
"""Entries that a program holds at a time."""

_PIVOTS = 4
"""Thresholds that one reading of a row tries: four leave a fifth of the range."""


def reference(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> tuple[Tensor, Tensor]:
    """The last entry that each row keeps.

    Filters apply after temperature, in this order: min_p, top_k, top_p over the mass that the others left.

    Args:
        logits: [rows, vocabulary], any floating dtype; rows with a NaN, or nothing but −∞, get any entry.
        temperature: [rows] float32; 0: the row keeps everything, whatever the filters.
        top_k: [rows] int64; 0: all.
        top_p: [rows] float32 in (0, 1].
        min_p: [rows] float32 in [0, 1], of the likeliest entry's probability.

    Returns:
        (value [rows] float32, id [rows] int32) of the last entry; (−∞, vocabulary) where a row keeps all.
    """
    vocabulary = logits.shape[1]
    scaled = scale(logits, temperature)
    ordered, ids = scaled.sort(dim=-1, descending=True, stable=True)
    kept = ordered.exp() >= min_p.double().unsqueeze(1)
    rank = torch.arange(vocabulary, device=logits.device)
    kept &= rank < torch.where(top_k > 0, top_k, vocabulary).unsqueeze(1)
    shares = ordered.masked_fill(~kept, -math.inf).softmax(-1)
    before = shares.cumsum(-1) - shares
    kept &= (before < top_p.double().unsqueeze(1)) | (top_p.unsqueeze(1) >= 1)
    count = torch.where(temperature > 0, kept.sum(-1), vocabulary)
    last = ids.gather(1, (count - 1).clamp(min=0).unsqueeze(1))
    everything = count == vocabulary
    value = logits.float().gather(1, last).squeeze(1).masked_fill(everything, -math.inf)
    return value, last.squeeze(1).masked_fill(everything, vocabulary).int()


def scale(logits: Tensor, temperature: Tensor) -> Tensor:
    """[rows, vocabulary] float64: logits less the row's greatest, over the temperature where that is not 0."""
    wide = logits.double()
    top = wide.max(-1, keepdim=True).values
    temperature = torch.where(temperature > 0, temperature, 1.0).double().unsqueeze(1)
    return torch.where(wide == top, 0.0, (wide - top) / temperature)


def fused(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> tuple[Tensor, Tensor]:
    """`reference` on a GPU, without sorting: one program a row, which leaves at once if nothing is filtered.

    The last entry's value is searched for among all values of the dtype, by counting or weighing what lies above. Sums
    are float32: where the nucleus ends within a millionth of an entry's bound, it may end there or at the next.

    Args:
        logits: [rows, vocabulary ≤ 2²⁴] float32, float16 or bfloat16, rows of any stride.
        temperature, top_k, top_p, min_p: as in `reference`, of any stride.
    """
    rows, vocabulary = logits.shape
    value = torch.empty(rows, dtype=torch.float32, device=logits.device)
    last = torch.empty(rows, dtype=torch.int32, device=logits.device)
    if vocabulary == 1:  # nothing to filter, and Triton 3.6 fails to compile the loops
        return value.fill_(-math.inf), last.fill_(1)
    if rows:
        _candidates_kernel[(rows,)](
            logits, temperature, top_k, top_p, min_p, value, last, vocabulary, logits.stride(0),
            temperature.stride(0), top_k.stride(0), top_p.stride(0), min_p.stride(0), _PIVOTS, _TILE, num_warps=16,
        )  # fmt: skip
    return value, last


@kernel_varying("temperatures", "top_ks", "top_ps", "min_ps")
def _candidates_kernel(  # type: ignore[no-untyped-def]
    logits, temperatures, top_ks, top_ps, min_ps, values, lasts, vocabulary, row_stride,
    temperature_stride, top_k_stride, top_p_stride, min_p_stride, PIVOTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures + row * temperature_stride)
    top_k = tl.load(top_ks + row * top_k_stride)
    top_p = tl.load(top_ps + row * top_p_stride)
    min_p = tl.load(min_ps + row * min_p_stride)
    top_k = tl.where((top_k > 0) & (top_k < vocabulary), top_k, vocabulary).to(tl.int32)
    tl.store(values + row, float("-inf"))
    tl.store(lasts + row, vocabulary)
    if (temperature <= 0) | ((top_k == vocabulary) & (top_p >= 1) & (min_p <= 0)):
        return
    dtype: tl.constexpr = logits.dtype.element_ty
    source = logits + row * row_stride
    at = tl.arange(0, TILE)
    tops = tl.full((TILE,), float("-inf"), tl.float32)
    for start in tl.range(0, vocabulary, TILE, num_stages=3):
        tops = tl.maximum(tops, _load(source, start + at, vocabulary))
    top = tl.max(tops, axis=0)
    origin = tl.clamp(top, -3.4028234663852886e38, 3.4028234663852886e38)
    scale = 1.4426950408889634 / tl.maximum(temperature, 1e-30)  # of exponents to base 2
    high = _code(top, dtype)
    low = _code(tl.full((), float("-inf"), tl.float32), dtype)
    if min_p > 0:
        floor = top.to(tl.float64) + temperature.to(tl.float64) * tl.log(min_p.to(tl.float64))
        # The least value of the dtype that is not below the floor: at most one from the nearest, to either side.
        low = tl.maximum(_code(floor.to(tl.float32), dtype) - 1, low)
        low += (_value(low, dtype).to(tl.float64) < floor).to(tl.int64)
        low += (_value(low, dtype).to(tl.float64) < floor).to(tl.int64)
    last = vocabulary
    if (top_k < vocabulary) | (top_p < 1):
        if top_k < vocabulary:
            low = _bound(tops, low, high, top_k, dtype)
            low = _search(source, vocabulary, low, high, top_k.to(tl.float32), origin, scale, False, PIVOTS, TILE)
        above, equal, mass = _weigh(source, vocabulary, _value(low, dtype), origin, scale, TILE)
        kept = tl.minimum(top_k - above, equal)
        if top_p < 1:
            total = mass + kept.to(tl.float32) * _weight(_value(low, dtype), origin, scale)
            target = top_p * total
            # Entries below this hold less than 1 − top_p together; a little lower still, for rounding.
            bound = top + temperature * (tl.log((1 - top_p) * total / vocabulary) - 0.01) - 1e-6 * tl.abs(top)
            begin = tl.maximum(low, tl.minimum(_code(bound, dtype) - 1, high))
            least = _search(source, vocabulary, begin, high, target, origin, scale, True, PIVOTS, TILE)
            above, equal, mass = _weigh(source, vocabulary, _value(least, dtype), origin, scale, TILE)
            kept = tl.where(least > low, equal, kept)
            low = least
            wanted = tl.ceil((target - mass) / _weight(_value(low, dtype), origin, scale))
            kept = tl.maximum(tl.minimum(wanted, kept.to(tl.float32)), 1).to(tl.int32)
        if kept < equal:
            last = _place(source, vocabulary, _value(low, dtype), kept, TILE)
    tl.store(values + row, _value(low, dtype))
    tl.store(lasts + row, last)


@kernel
def _search(  # type: ignore[no-untyped-def]
    source, vocabulary, low, high, target, origin, scale, WEIGH: tl.constexpr, PIVOTS: tl.constexpr, TILE: tl.constexpr
):
    """The greatest code such that the entries from its value up number, or weigh, at least ``target``; else ``low``.

    A lesser one if that makes no difference: between its value and the greatest's there is no entry.
    """
    pivot, at = tl.arange(0, PIVOTS), tl.arange(0, TILE)
    while low < high:
        codes = low + ((high - low) * (pivot + 1) + PIVOTS) // (PIVOTS + 1)
        values = _value(codes, source.dtype.element_ty)[:, None]
        held = tl.zeros((PIVOTS, TILE), tl.float32)
        for start in tl.range(0, vocabulary, TILE, num_stages=3):
            x = _load(source, start + at, vocabulary)
            weight = _weight(x, origin, scale) if WEIGH else tl.full((TILE,), 1.0, tl.float32)
            held += tl.where(x[None, :] >= values, weight[None, :], 0.0)
        sums = tl.sum(held, axis=1)
        low = tl.max(tl.where(sums >= target, codes, low), axis=0)
        high = tl.min(tl.where(sums >= target, high, codes - 1), axis=0)
        exact = tl.max((sums == target).to(tl.int32), axis=0) > 0
        high = tl.where(exact, low, high)
    return low


@kernel
def _bound(tops, low, high, count, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """The greatest code that ``count`` of ``tops``, each another entry, reach; else ``low``."""
    while low < high:
        middle = low + (high - low + 1) // 2
        enough = tl.sum((tops >= _value(middle, dtype)).to(tl.int32), axis=0) >= count
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle - 1)
    return low


@kernel
def _weigh(source, vocabulary, value, origin, scale, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many entries are greater than ``value``, how many equal, and what the greater ones weigh."""
    at = tl.arange(0, TILE)
    above, equal = tl.zeros((TILE,), tl.int32), tl.zeros((TILE,), tl.int32)
    mass = tl.zeros((TILE,), tl.float32)
    for start in tl.range(0, vocabulary, TILE, num_stages=3):
        x = _load(source, start + at, vocabulary)
        above += (x > value).to(tl.int32)
        equal += ((x == value) & (start + at < vocabulary)).to(tl.int32)
        mass += tl.where(x > value, _weight(x, origin, scale), 0.0)
    return tl.sum(above, axis=0), tl.sum(equal, axis=0), tl.sum(mass, axis=0)


@kernel
def _place(source, vocabulary, value, count, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The id of the ``count``-th entry that equals ``value``."""
    at = tl.arange(0, TILE)
    start, before = 0, 0
    equal = (_load(source, at, vocabulary) == value).to(tl.int32)
    number = tl.sum(equal, axis=0)
    while (before + number < count) & (start + TILE < vocabulary):
        before += number
        start += TILE
        equal = (_load(source, start + at, vocabulary) == value).to(tl.int32)
        number = tl.sum(equal, axis=0)
    found = (equal > 0) & (before + tl.cumsum(equal, axis=0) == count)
    return start + tl.max(tl.where(found, at, -1), axis=0)


@kernel
def _load(source, at, vocabulary):  # type: ignore[no-untyped-def]
    return tl.load(source + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32)


@kernel
def _weight(x, origin, scale):  # type: ignore[no-untyped-def]
    return tl.exp2(tl.minimum((x - origin) * scale, 0.0))


@kernel
def _code(value, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """An integer that orders as the nearest value of ``dtype`` does; ± 1 is the next value."""
    if dtype.primitive_bitwidth == 32:
        return _flip(value.to(tl.int32, bitcast=True).to(tl.int64), 0x7FFFFFFF)
    else:
        return _flip(value.to(dtype).to(tl.int16, bitcast=True).to(tl.int64), 0x7FFF)


@kernel
def _value(code, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """The float32 that `_code` made ``code`` of."""
    if dtype.primitive_bitwidth == 32:
        return _flip(code, 0x7FFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        return _flip(code, 0x7FFF).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)


@kernel
def _flip(bits, magnitude):  # type: ignore[no-untyped-def]
    return tl.where(bits < 0, bits ^ magnitude, bits)
