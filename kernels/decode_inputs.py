"""The device's part in laying out a decode batch: tokens that the host does not know yet, and block tables, which it
sends once."""

from __future__ import annotations

from torch import Tensor

from .on_gpu import kernel_varying, tl

_CHUNK = 256


def reference(
    tokens: Tensor,
    positions: Tensor,
    slots: Tensor,
    rows: Tensor,
    last_tokens: Tensor,
    tables: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    block_tokens: int,
) -> None:
    """Complete a batch of single tokens, in place.

    Args:
        tokens: [n] int64; a negative one becomes the last token that was sampled for its row.
        positions: [n] int64.
        slots: [groups, n] int64: where each token's KV goes, in each KV group's blocks; negative: the row only fills
            the batch up.
        rows: [n] int64, all different but those that fill up: which row of the state each token belongs to.
        last_tokens: [rows] int64.
        tables: [groups, rows, max_blocks] int64: each row's blocks in order. The block of each token's slot is entered.
        block_tables: [groups, ≥ n, max_blocks] int64, overwritten with the rows' tables as far as their contexts reach.
        context_lens: [≥ n] int64, overwritten: tokens of each context, the new one included; 0 for rows that fill up.
        block_tokens: tokens a block.
    """
    n = len(tokens)
    tokens.copy_(last_tokens[rows].clamp(min=0).where(tokens < 0, tokens))
    held = slots[0] >= 0
    tables[:, rows[held], positions[held] // block_tokens] = slots[:, held] // block_tokens
    block_tables[:, :n] = tables[:, rows]
    context_lens[:n] = (positions + 1).masked_fill(~held, 0)


def fused(
    tokens: Tensor,
    positions: Tensor,
    slots: Tensor,
    rows: Tensor,
    last_tokens: Tensor,
    tables: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    block_tokens: int,
) -> None:
    """`reference` on a GPU: one program a token and group."""
    if len(tokens):
        _complete_kernel[(len(tokens), len(slots))](
            tokens, positions, slots, rows, last_tokens, tables, block_tables, context_lens, block_tokens,
            slots.stride(0), *tables.stride()[:2], *block_tables.stride()[:2], _CHUNK,
        )  # fmt: skip


@kernel_varying("slot_stride")
def _complete_kernel(  # type: ignore[no-untyped-def]
    tokens, positions, slots, rows, last_tokens, tables, block_tables, context_lens, block_tokens, slot_stride,
    table_group_stride, table_stride, out_group_stride, out_stride, CHUNK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1).to(tl.int64)
    tables += group * table_group_stride
    block_tables += group * out_group_stride
    row = tl.load(rows + at)
    slot = tl.load(slots + group * slot_stride + at)
    position = tl.load(positions + at)
    if group == 0:
        token = tl.load(tokens + at)
        if token < 0:
            token = tl.maximum(tl.load(last_tokens + row), 0)  # below zero where the logits were not numbers
        tl.store(tokens + at, token)
        tl.store(context_lens + at, tl.where(slot < 0, 0, position + 1))
    if slot >= 0:
        last = position // block_tokens
        block = slot // block_tokens
        tl.store(tables + row * table_stride + last, block)
        for start in range(0, last + 1, CHUNK):
            index = start + tl.arange(0, CHUNK)
            value = tl.load(tables + row * table_stride + index, mask=index < last, other=0)
            value = tl.where(index == last, block, value)  # just stored: another thread may not see it yet
            tl.store(block_tables + at * out_stride + index, value, mask=index <= last)
