"""How urgent a request is: a level of three, by which loads and metrics tell priorities apart, of which there may be
any number."""

from __future__ import annotations

from collections.abc import Iterable

LEVELS = ("high", "normal", "low")
"""Priorities below 0, 0, and above."""
LEAST = len(LEVELS) - 1
"""Everything is at least as urgent as this level."""


def level_of(priority: int) -> int:
    """The index in `LEVELS` of a request's priority."""
    return 0 if priority < 0 else 2 if priority else 1


def before_levels(queued: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """What comes before a request of each level.

    Args:
        queued: priority and tokens of each request.

    Returns:
        By level, how many are as urgent, and their tokens.
    """
    counts, tokens = [0] * len(LEVELS), [0] * len(LEVELS)
    for priority, num_tokens in queued:
        level = level_of(priority)
        counts[level] += 1
        tokens[level] += num_tokens
    return [(sum(counts[: level + 1]), sum(tokens[: level + 1])) for level in range(len(LEVELS))]
