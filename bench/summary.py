"""From replies to figures."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from .client import Reply

PERCENTILES = (50, 90, 99)


class Slo(NamedTuple):
    """What a request must meet to count for goodput: time to first token, and mean time between its tokens."""

    ttft_s: float
    itl_s: float


def percentile(values: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile; NaN of nothing."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Percentiles, mean and count."""
    figures = {f"p{percent}": round(percentile(values, percent), 6) for percent in PERCENTILES}
    return figures | {"mean": round(sum(values) / len(values), 6) if values else math.nan, "count": len(values)}


def summarize(replies: Sequence[Reply], slo: Slo) -> dict[str, Any]:
    """Figures of one run, seconds throughout; failures are counted by message and never hidden."""
    good = [reply for reply in replies if not reply.error and reply.token_times_s]
    start_s = min(reply.sent_s for reply in replies)
    seconds = max(reply.end_s for reply in replies) - start_s
    ttft = [reply.token_times_s[0] - reply.sent_s for reply in good]
    gaps = [b - a for reply in good for a, b in zip(reply.token_times_s, reply.token_times_s[1:], strict=False)]
    within = sum(1 for reply, first in zip(good, ttft, strict=True) if first <= slo.ttft_s and _itl(reply) <= slo.itl_s)
    tokens = sum(len(reply.tokens) for reply in good)
    return {
        "requests": len(replies),
        "failures": dict(Counter(reply.error for reply in replies if reply.error)),
        "seconds": round(seconds, 4),
        "output_tokens": tokens,
        "output_tokens_per_s": round(tokens / seconds, 2),
        "requests_per_s": round(len(good) / seconds, 4),
        "goodput_requests_per_s": round(within / seconds, 4),
        "slo": {"ttft_s": slo.ttft_s, "itl_s": slo.itl_s},
        "slo_attainment": round(within / len(replies), 4),
        "ttft_s": spread(ttft),
        "itl_s": spread(gaps),
        "e2e_s": spread([reply.end_s - reply.sent_s for reply in good]),
    }


def _itl(reply: Reply) -> float:
    count = len(reply.token_times_s) - 1
    return (reply.token_times_s[-1] - reply.token_times_s[0]) / count if count else 0.0
