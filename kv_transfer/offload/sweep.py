"""Many configurations of the tiers in one file: a list where the schema wants one value stands for each of its entries.

All combinations are replayed on the same trace, and judged by what their capacity costs and how soon first tokens come.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, get_args, get_origin

import numpy as np
from pydantic import BaseModel

from ...core.config import OffloadConfig
from ...core.errors import ConfigError
from .replay import Outcome

MOST_ALTERNATIVES = 1000

_GIB = 1 << 30
_AS_GOOD = 1.01
"""Of two times to first token with less than this between them, neither counts as better."""


class Alternative(NamedTuple):
    """One combination."""

    tree: dict[str, Any]
    """The whole file, with one value for every key."""
    choices: Mapping[str, Any]
    """Key → value, of those keys that have several: "tiers.0.capacity" → "4GiB"."""


class Judged(NamedTuple):
    """What a configuration costs and does."""

    choices: Mapping[str, Any]
    cost: float
    outcome: Outcome
    replay_s: float

    @property
    def ttft_p90_s(self) -> float:
        """What configurations are compared by."""
        return float(np.percentile(self.outcome.ttft_s, 90))


def expand(tree: Mapping[str, Any]) -> list[Alternative]:
    """All combinations of the lists in the ``offload`` section. Pure.

    Where the schema has a list, as for ``path`` and ``tiers``, a list of lists stands for each of these.

    Raises:
        ConfigError: a list is empty, or there are more than `MOST_ALTERNATIVES` combinations.
    """
    found = [
        Alternative({**tree, "offload": value}, choices)
        for value, choices in itertools.islice(
            _alternatives(OffloadConfig, tree.get("offload", {}), ""), MOST_ALTERNATIVES + 1
        )
    ]
    if len(found) > MOST_ALTERNATIVES:
        raise ConfigError(f"offload: more than {MOST_ALTERNATIVES} combinations", fix="give shorter lists")
    return found


def cost_of(config: OffloadConfig, prices: Mapping[str, float]) -> float:
    """What the capacity of all tiers costs.

    Args:
        config: the tiers.
        prices: of a GiB, by kind of tier.
    """
    return sum(tier.capacity / _GIB * prices[tier.kind] for tier in config.tiers)


def pareto(judged: Sequence[Judged]) -> list[int]:
    """Those than which no other is both cheaper and sooner, or one of it and as good in the other; cheapest first."""
    order = sorted(range(len(judged)), key=lambda place: (judged[place].cost, judged[place].ttft_p90_s))
    front: list[int] = []
    for place in order:
        if not front or judged[place].ttft_p90_s < judged[front[-1]].ttft_p90_s:
            front.append(place)
    return front


def check_budget(costs: Sequence[float], budget: float | None) -> None:
    """Whether anything is within the budget.

    Raises:
        ConfigError: nothing is.
    """
    if budget is not None and min(costs) > budget:
        raise ConfigError(f"no configuration costs {budget:g} or less", fix=f"the cheapest costs {min(costs):g}")


def best(judged: Sequence[Judged], budget: float | None = None) -> int:
    """The cheapest of those within the budget whose 90th percentile is at most 1 % above the least.

    Raises:
        ConfigError: none is within the budget.
    """
    check_budget([entry.cost for entry in judged], budget)
    affordable = [place for place in pareto(judged) if budget is None or judged[place].cost <= budget]
    most_s = _AS_GOOD * judged[affordable[-1]].ttft_p90_s
    return next(place for place in affordable if judged[place].ttft_p90_s <= most_s)


def record(judged: Judged) -> dict[str, Any]:
    """A configuration's line of JSON. Rates are shares of all prompt tokens, but for ``hit_rate_blocks``."""
    outcome = judged.outcome
    moved = {name: {"loaded": tier.loaded_bytes, "stored": tier.stored_bytes} for name, tier in outcome.tiers.items()}
    p50_s, p90_s = (round(float(value), 6) for value in np.percentile(outcome.ttft_s, (50, 90)))
    return {
        "choices": dict(judged.choices),
        "requests": len(outcome.ttft_s),
        "prompt_tokens": outcome.prompt_tokens,
        "hit_tokens": outcome.hit_tokens,
        "hit_rate": round(outcome.hit_tokens / outcome.prompt_tokens, 6),
        "hit_rate_by_tier": {
            name: round(tier.hit_tokens / outcome.prompt_tokens, 6) for name, tier in outcome.tiers.items()
        },
        "hit_rate_blocks": round(outcome.hit_blocks / outcome.num_blocks, 6),
        "bytes_moved": sum(sum(tier.values()) for tier in moved.values()),
        "bytes_moved_by_tier": moved,
        "ttft_p50_s": p50_s,
        "ttft_p90_s": p90_s,
        "workers_busy": round(outcome.busy, 4),
        "cost": round(judged.cost, 4),
        "evicted": {name: tier.evicted for name, tier in outcome.tiers.items()},
        "refused": {name: tier.refused for name, tier in outcome.tiers.items()},
        "failures": {name: dict(tier.failures) for name, tier in outcome.tiers.items()},
        "moved_down": outcome.moved_down,
        "replay_s": round(judged.replay_s, 3),
    }


def _alternatives(annotation: Any, value: Any, path: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Each value that is meant, with what was chosen for it. What is not as the schema wants it stays as it is: the
    check of the whole refuses it."""
    if get_origin(annotation) is tuple:
        if isinstance(value, list) and value and all(isinstance(entry, list) for entry in value):
            for entry in value:
                for got, choices in _alternatives(annotation, entry, path):
                    yield got, {path: _told(entry)} | choices
        elif isinstance(value, list):
            [item, *_] = get_args(annotation)
            parts = [list(_alternatives(item, entry, _join(path, str(n)))) for n, entry in enumerate(value)]
            for combination in itertools.product(*parts):
                yield [got for got, _ in combination], _merged(choices for _, choices in combination)
        else:
            yield value, {}
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if not isinstance(value, dict):
            yield value, {}
            return
        fields = annotation.model_fields
        parts = [
            list(_alternatives(fields[key].annotation if key in fields else dict, entry, _join(path, str(key))))
            for key, entry in value.items()
        ]
        for combination in itertools.product(*parts):
            got = dict(zip(value, (entry for entry, _ in combination), strict=True))
            yield got, _merged(choices for _, choices in combination)
    elif isinstance(value, list) and annotation is not dict:
        if not value:
            raise ConfigError(f"offload.{path}: an empty list", fix="give one value, or a list of those to compare")
        for entry in value:
            yield entry, {path: entry}
    else:
        yield value, {}


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _merged(parts: Iterator[dict[str, Any]]) -> dict[str, Any]:
    return {key: value for part in parts for key, value in part.items()}


def _told(entries: Sequence[Any]) -> str:
    """A whole list in a few words: kinds of tiers, or folders."""
    return " + ".join(str(entry.get("kind", "?")) if isinstance(entry, dict) else str(entry) for entry in entries)
