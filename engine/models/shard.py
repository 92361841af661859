"""What one rank of a tensor-parallel group holds of a model (Shoeybi et al. 2019, arXiv:1909.08053).

Attention is cut by heads and the feed-forward part by its inner size: whatever lies between two sums over the ranks is
a smaller layer of the same kind, with a spec of its own.
"""

from __future__ import annotations

from dataclasses import replace

from ...core.errors import ConfigError
from .spec import ModelSpec


def shard(spec: ModelSpec, size: int, *, whole_experts: bool = False) -> ModelSpec:
    """The spec of each rank's layers, when ``size`` ranks share a model. Vocabulary and hidden size stay whole.

    Args:
        spec: of the model.
        size: ranks.
        whole_experts: whether ranks have different experts instead of a part of each.

    Raises:
        ConfigError: something does not divide.
    """
    if size == 1:
        return spec
    _check_multiple("attention heads", spec.num_heads, size)
    if spec.num_kv_heads % size and size % spec.num_kv_heads:
        raise ConfigError(
            f"{spec.architecture}: {spec.num_kv_heads} key and value heads can be neither divided among {size} ranks "
            "nor held by equally many ranks each",
            fix="a number of ranks that divides the number of key and value heads, or is a multiple of it",
        )
    if len(spec.moe_layers) < spec.num_layers:
        _check_multiple("the inner size of the feed-forward part", spec.inner, size)
    if spec.moe is not None:
        if not whole_experts:
            _check_multiple("the inner size of an expert", spec.moe.inner, size)
        _check_multiple("the inner size of the shared experts", spec.moe.shared_inner, size)
    return replace(
        spec,
        num_heads=spec.num_heads // size,
        num_kv_heads=local_kv_heads(spec, size),
        inner=spec.inner // size,
        moe=spec.moe
        and replace(
            spec.moe,
            inner=spec.moe.inner if whole_experts else spec.moe.inner // size,
            shared_inner=spec.moe.shared_inner // size,
        ),
    )


def local_kv_heads(spec: ModelSpec, size: int) -> int:
    """How many key and value heads a rank's cache has: at least one; with fewer heads than ranks, several hold the
    same."""
    return max(1, spec.num_kv_heads // size)


def first_kv_head(spec: ModelSpec, rank: int, size: int) -> int:
    """The first key and value head of a rank."""
    return rank * spec.num_kv_heads // size


def kv_heads_of(spec: ModelSpec, rank: int, size: int) -> range:
    """The model's key and value heads whose KV is in a rank's cache."""
    first = first_kv_head(spec, rank, size)
    return range(first, first + local_kv_heads(spec, size))


def vocabulary_rows(spec: ModelSpec, rank: int, size: int) -> range:
    """The rows of the head that a rank has; the last ranks have fewer where ``size`` does not divide the vocabulary."""
    each = padded_rows(spec, size)
    return range(min(rank * each, spec.vocab_size), min((rank + 1) * each, spec.vocab_size))


def padded_rows(spec: ModelSpec, size: int) -> int:
    """Rows of the head on each rank, those that only fill it up included."""
    return -(-spec.vocab_size // size)


def _check_multiple(what: str, found: int, size: int) -> None:
    if found % size:
        raise ConfigError(
            f"{what}: {found} cannot be divided among {size} ranks, expected a multiple of {size}",
            fix=f"a number of ranks that divides {found}",
        )
