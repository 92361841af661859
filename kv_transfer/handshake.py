"""Whether one worker's KV can be read by another: what may differ, and what may not. Pure."""

from __future__ import annotations

from ..core.messages import Hello
from .layout import DTYPE_BYTES
from .plan import cover_heads


def refusal(reader: Hello, source: Hello) -> str:
    """The first field for whose sake ``reader`` cannot read the KV of ``source``, with both values; "": none.

    Block sizes, dtypes, the ranks' heads and the layer groups may differ: reads are planned between what each end has.
    """
    who = source.peer, reader.peer
    if source.protocol != reader.protocol:
        return f"protocol: {source.peer} speaks version {source.protocol}, {reader.peer} {reader.protocol}"
    if source.fingerprint != reader.fingerprint:
        return f"model: {source.peer} serves {source.fingerprint}, {reader.peer} {reader.fingerprint}"
    theirs, ours = source.cache, reader.cache
    for field in ("num_parts", "num_kv_heads", "head_dim", "num_layers", "groups"):
        found, expected = getattr(theirs, field), getattr(ours, field)
        if found != expected:
            return _differs(field, who, found, expected)
    if theirs.dtype != ours.dtype and not {theirs.dtype, ours.dtype} <= DTYPE_BYTES.keys():
        return f"{_differs('dtype', who, theirs.dtype, ours.dtype)}, and there is no conversion"
    if any(group.window for group in ours.groups) and theirs.block_tokens % ours.block_tokens:
        # Else the reader's first block in sight of a window would begin before what the source still has.
        differs = _differs("block_tokens", who, theirs.block_tokens, ours.block_tokens)
        return f"{differs}; with windowed layers the reader's must divide the other"
    for hello in (source, reader):
        num_layers = sum(len(group.layers) for group in hello.cache.groups)
        starts = hello.layer_groups
        if starts[:1] != [0] or starts != sorted(set(starts)) or starts[-1] >= num_layers:
            return f"kv.layer_groups: {hello.peer} has {starts}, not ascending first layers of {num_layers}"
    offered = [range(rank.first_head, rank.first_head + rank.num_heads) for rank in source.ranks]
    try:
        if any(heads.stop > ours.num_kv_heads for heads in offered):
            raise ValueError("there are no such heads")
        cover_heads(range(ours.num_kv_heads), offered)
    except ValueError as error:
        return f"ranks: {source.peer} has heads {offered}, {reader.peer} needs {ours.num_kv_heads}: {error}"
    return ""


def _differs(field: str, who: tuple[str, str], found: object, expected: object) -> str:
    return f"kv.{field}: {who[0]} has {found}, {who[1]} {expected}"
