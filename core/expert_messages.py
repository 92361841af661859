"""What is told about the experts of a group of workers that share them. Part of `messages.Report`."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from .bounds import Count, Name, Seconds, Text

Bytes = Annotated[int, Meta(ge=0, le=1 << 62)]


class ExpertsReport(Struct, frozen=True):
    """From the worker that plans, the first of its group."""

    num_ranks: Count
    num_layers: Count
    """With experts."""
    num_experts: Count
    """Of a layer."""
    num_slots: Count
    """Of a layer, over all ranks."""
    max_replicas: Count
    """Of one expert, in any layer."""
    state: Name
    """watching, planning or moving."""
    placed_at_s: float
    """Wall clock: since when experts are where they are."""
    balancedness: float = 1.0
    """Σ over layers of the mean over ranks ÷ Σ of the fullest rank: as counted, over the window."""
    predicted: float = 1.0
    """Of the placement that was planned last."""
    window_steps: Count = 0
    """Steps of the window."""
    outcome: Name = ""
    """Of the last attempt, or "declined"; empty: there was none."""
    detail: Text = ""
    """Why."""
    ended_at_s: float = 0.0
    """Wall clock."""
    took_s: Seconds = 0.0
    moved: Count = 0
    """Experts that came to ranks that did not have them, in the last attempt."""
    moved_bytes: Bytes = 0
    attempts: Annotated[dict[Name, Count], Meta(max_length=64)] = {}
    """By outcome, since the group formed."""
    total_moved: Count = 0
    total_bytes: Bytes = 0


class LoadEntry(Struct, frozen=True):
    """What experts computed in some steps, over all ranks."""

    number: Count
    """From 1."""
    steps: Count
    tokens: bytes
    """[layers, experts] int64, little-endian."""


class LoadEntries(Struct, frozen=True):
    """An answer to `tandem trace experts`."""

    entries: list[LoadEntry] = []
    num_layers: Count = 0
    num_experts: Count = 0
    model: Text = ""
    last: Count = 0
    """Number of the newest entry."""
