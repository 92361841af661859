"""What processes tell their node's supervisor, and what the controller tells it of them. Carried by Ray, as bytes."""

from __future__ import annotations

import msgspec

from .bounds import Count, Name, Seconds, Text


class LocalRank(msgspec.Struct, frozen=True):
    """A process that lives, or should live, on a node."""

    worker: Name
    """A `WorkerId`."""
    peer: Name
    """Its present life, a `PeerId`."""
    role: Name
    rank: Count
    """Its number among the workers that share experts; 0 where each has all."""
    phase: Text
    """As the controller sees it."""
    restarts: Count


class Vitals(msgspec.Struct, frozen=True):
    """A process's answer."""

    stalled_s: Seconds
    """How long it has had work and taken no step."""
    metrics: str = ""
    """In Prometheus' text format, if they were asked for."""


class Judgement(msgspec.Struct, frozen=True):
    """What a supervisor thinks of a rank."""

    rank: LocalRank
    problem: str
    """Why it is not ready; "" if it is, or need not be."""
    stalled_s: float
