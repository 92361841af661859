"""Gives sequences their blocks, in every KV group.

All groups take their blocks from one pool. A group whose layers see everything keeps a block for every token. One whose
layers see a window keeps those that a token to come may still see; the others are *dead* and go back to the pool while
the sequence runs. Their content stays in the prefix cache, under keys that name the group too, until they are reused.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Several

from ..core.hashing import BlockHash
from ..kv_transfer.layout import KVGroup
from .block_pool import BlockPool
from .prefixes import Part, group_key, group_keys, longest_window
from .sequence import Sequence


def num_blocks_needed(groups: Several[KVGroup], num_tokens: int, max_chunk: int, block_tokens: int) -> int:
    """Blocks with which a sequence can be computed up to ``num_tokens`` tokens, in chunks of ``max_chunk``, and then
    handed over. Pure."""
    whole = -(-num_tokens // block_tokens)
    windows = [_num_ahead(group, max_chunk, block_tokens) - (-group.window // block_tokens) + 1 for group in groups]
    return sum(min(whole, own) if group.window else whole for group, own in zip(groups, windows, strict=True))


def _num_ahead(group: KVGroup, max_chunk: int, block_tokens: int) -> int:
    """Blocks that a window and a chunk after it touch, however they lie."""
    return -(-(group.window + max_chunk) // block_tokens) + 1


class Allocator:
    """The blocks of all sequences. Owned by the engine thread; nothing blocks.

    Args:
        pool: where blocks come from.
        groups: of the model's layers.
        block_tokens: tokens a block.
        max_chunk: tokens of the largest part of a prompt that is computed at once.

    Attributes:
        num_submitted: steps that were started.
        num_collected: steps that have ended.
    """

    def __init__(self, pool: BlockPool, groups: Several[KVGroup], block_tokens: int, max_chunk: int) -> None:
        self.num_submitted = 0
        self.num_collected = 0
        self._pool = pool
        self._groups = groups
        self._block_tokens = block_tokens
        self._max_chunk = max_chunk
        self._windowed = [number for number, group in enumerate(groups) if group.window]
        self._whole = [number for number, group in enumerate(groups) if not group.window]
        # Blocks that steps in flight still read or write, with the newest such step: nobody else may get them, as
        # transports do not wait for the device.
        self._busy: deque[tuple[int, list[int]]] = deque()

    def match(self, sequence: Sequence) -> int:
        """Give a sequence that has no blocks those of its longest cached prefix, leaving at least one token to compute.

        A prefix is cached if every group has what its next token sees: all its blocks, or the window's.

        Returns:
            tokens that need not be computed.
        """
        keys = sequence.keys((sequence.num_tokens - 1) // self._block_tokens, self._block_tokens)
        num_blocks, tables = self._cached(keys)
        for group in range(len(self._groups)):
            if group in tables:
                start, blocks = 0, tables[group][:num_blocks]
            else:
                start = self._groups[group].first_block(num_blocks * self._block_tokens, self._block_tokens)
                found = [self._pool.find(group_key(key, group)) for key in keys[start:num_blocks]]
                blocks = [block for block in found if block is not None]
            self._pool.acquire(blocks)
            sequence.add_blocks(blocks, group, range(start, num_blocks) if start else None)
        sequence.num_computed = sequence.num_reserved = num_blocks * self._block_tokens
        sequence.num_committed = sequence.num_matched_blocks = num_blocks
        return sequence.num_computed

    def num_cached(self, keys: Several[BlockHash]) -> int:
        """How many blocks the longest cached prefix of ``keys`` has. Takes no reference."""
        return self._cached(keys)[0]

    def num_lacking(self, num_tokens: int, num_matched: int) -> int:
        """Blocks that `reserve_prompt` takes, apart from those that a reader is told of, for a sequence that the
        prefix cache has ``num_matched`` blocks of."""
        total = -(-num_tokens // self._block_tokens)
        return sum(
            min(total - num_matched, _num_ahead(group, self._max_chunk, self._block_tokens))
            if group.window
            else total - num_matched
            for group in self._groups
        )

    def reserve(self, sequence: Sequence, num_tokens: int, first_token: int | None = None) -> bool:
        """Give a sequence blocks for ``num_tokens`` tokens in all, more than it has, and take its dead ones back.

        Args:
            sequence: whose.
            num_tokens: tokens that must have blocks, from the first that is not computed on.
            first_token: all tokens before this one are computed elsewhere: groups with a window get blocks for what it
                and later ones see, and for nothing before. Default: none are.

        Returns:
            False, having given nothing, when there are not enough.
        """
        self.trim(sequence)
        end = -(-num_tokens // self._block_tokens)
        start = sequence.num_computed // self._block_tokens
        wanted = []
        for number, group in enumerate(self._groups):
            if first_token is not None:
                start = group.first_needed(first_token) // self._block_tokens
            wanted.append(self._lacking(sequence, number, start, end))
        if not self._give(sequence, wanted):
            return False
        if first_token is None:
            sequence.num_reserved = max(sequence.num_reserved, end * self._block_tokens)
        return True

    def reserve_prompt(self, sequence: Sequence, spare: int, *, announced: bool) -> bool:
        """Give a sequence that is about to start all blocks with which it can be computed without waiting for others:
        groups with a window get those of a window and a chunk, and `room` moves them along.

        Args:
            sequence: matched against the prefix cache.
            spare: blocks that must be left.
            announced: whether the blocks that the token after the known ones sees are given now, too: somebody will be
                told where they are.

        Returns:
            False, having given nothing, when there are not enough.
        """
        total = -(-sequence.num_tokens // self._block_tokens)
        wanted = []
        for number, group in enumerate(self._groups):
            lacking = self._lacking(sequence, number, *self._ahead(sequence, group))
            if announced and group.window:
                tail = self._lacking(
                    sequence, number, group.first_needed(sequence.num_tokens) // self._block_tokens, total
                )
                lacking = sorted({*lacking, *tail})
            wanted.append(lacking)
        if sum(map(len, wanted)) + spare > self._pool.num_free or not self._give(sequence, wanted):
            return False
        self._measure(sequence)
        return True

    def expect(self, sequence: Sequence) -> None:
        """A sequence that has `reserve_prompt`'s blocks gets its KV from elsewhere: groups with a window keep what is
        computed, and have blocks for what the token after the known ones sees, instead of those between."""
        if not self._windowed:
            return
        computed, total = (-(-n // self._block_tokens) for n in (sequence.num_computed, sequence.num_tokens))
        wanted: list[Several[int]] = [[] for _ in self._groups]
        for number in self._windowed:
            first = self._groups[number].first_needed(sequence.num_tokens) // self._block_tokens
            self._pool.release(sequence.take_blocks(number, computed, first))
            wanted[number] = self._lacking(sequence, number, first, total)
        given = self._give(sequence, wanted)
        assert given, "what was given back is more than a window"
        sequence.num_reserved = sequence.num_computed

    def room(self, sequence: Sequence, num_new: int) -> int:
        """For how many of the next ``num_new`` tokens of a prompt there are blocks, once its dead ones are replaced by
        new ones ahead. Fewer than asked for when other sequences found some of the dead ones in the prefix cache and
        hold them, or steps in flight do."""
        first = sequence.num_computed
        if first + num_new <= sequence.num_reserved:
            return num_new
        self.trim(sequence)
        num_new = min(num_new, self._max_chunk)
        ahead = [self._ahead(sequence, group) for group in self._groups]
        wanted = [self._lacking(sequence, number, *place) for number, place in enumerate(ahead)]
        if not self._give(sequence, wanted):
            self._give(sequence, self._nearest(wanted))
        self._measure(sequence)
        return min(num_new, max(sequence.num_reserved - first, 0))

    def trim(self, sequence: Sequence) -> None:
        """Take a sequence's dead blocks back; they are offered to the prefix cache."""
        if not self._windowed:
            return
        self.commit(sequence)
        for number in self._windowed:
            first = self._groups[number].first_block(sequence.num_computed, self._block_tokens)
            if number < len(sequence.tables):
                self._take_back(sequence, sequence.trim_blocks(number, first))

    def commit(self, sequence: Sequence) -> None:
        """Offer a sequence's full blocks to the prefix cache. A step in flight may still have to fill them: whoever
        finds them computes later."""
        full = min(sequence.num_computed, sequence.num_tokens) // self._block_tokens
        if full > sequence.num_committed:
            keys = sequence.keys(full, self._block_tokens)
            for group, table in enumerate(sequence.tables):
                for index in range(sequence.num_committed, min(full, len(table))):
                    if table[index] >= 0:
                        self._pool.commit(table[index], group_key(keys[index], group), sequence.root)
            sequence.num_committed = full

    def fork(self, parent: Sequence, fork: Sequence) -> list[tuple[int, int]] | None:
        """Give a new sequence the blocks of what ``parent`` has computed: full ones are shared.

        Returns:
            blocks to copy, as (source, target); None, having given nothing, when there are not enough.
        """
        full, partial = divmod(parent.num_computed, self._block_tokens)
        targets = self._pool.allocate(len(self._groups)) if partial else []
        if targets is None:
            return None
        copies = []
        for number, group in enumerate(self._groups):
            table = parent.tables[number]
            start = group.first_block(parent.num_computed, self._block_tokens)
            shared = table[start:full]
            self._pool.acquire(shared)
            own = [targets[number]] if partial else []
            fork.add_blocks(shared + own, number, range(start, start + len(shared) + len(own)) if start else None)
            if partial:
                copies.append((table[full], own[0]))
        fork.num_computed = parent.num_computed
        fork.num_reserved = (full + (partial > 0)) * self._block_tokens
        fork.num_committed = min(parent.num_committed, full)
        fork.num_offered = min(parent.num_offered, full)
        return copies

    def uncache(self, sequence: Sequence) -> None:
        """Let nobody find what a sequence has computed, in blocks that it has or has given back."""
        self._pool.uncache(block for table in sequence.tables for block in table if block >= 0)
        if self._windowed and sequence.num_committed:
            keys = sequence.keys(sequence.num_committed, self._block_tokens)
            found = [self._pool.find(group_key(key, group)) for group in self._windowed for key in keys]
            self._pool.uncache(block for block in found if block is not None)

    def release(self, sequence: Sequence) -> None:
        """Take all of a sequence's blocks back."""
        self._take_back(sequence, sequence.drop_blocks())

    def collected(self, step: int) -> None:
        """A step has ended, and all before it."""
        self.num_collected = step
        while self._busy and self._busy[0][0] <= step:
            self._pool.release(self._busy.popleft()[1])

    def _cached(self, keys: Several[BlockHash]) -> tuple[int, dict[int, list[int]]]:
        """How many blocks the longest cached prefix has, and those of groups that see everything, or more."""
        num_blocks = len(keys)
        tables: dict[int, list[int]] = {}
        for group in self._whole:
            tables[group] = self._pool.match(group_keys(keys[:num_blocks], group))
            num_blocks = min(num_blocks, len(tables[group]))

        def has(part: Part) -> bool:
            return self._pool.find(group_key(keys[part.position], part.group)) is not None

        return longest_window(self._groups, num_blocks, self._block_tokens, has), tables

    def _take_back(self, sequence: Sequence, blocks: list[int]) -> None:
        if sequence.last_step > self.num_collected:
            if blocks:
                self._busy.append((self.num_submitted, blocks))
        else:
            self._pool.release(blocks)

    def _ahead(self, sequence: Sequence, group: KVGroup) -> tuple[int, int]:
        """The range of blocks that a prompt has, while it is computed, from the next token's on.

        Those that came from the prefix cache are not counted, while it has them: others may have them too, and giving
        them back need not free any. So the prompt that started last, whose own blocks nobody else has, always has
        what it needs; it ends, and then the one before it is the last.
        """
        start, total = (n // self._block_tokens for n in (sequence.num_computed, sequence.num_tokens - 1))
        if not group.window:
            return start, total + 1
        own = max(group.first_block(sequence.num_computed, self._block_tokens), sequence.num_matched_blocks)
        return start, min(total + 1, own + _num_ahead(group, self._max_chunk, self._block_tokens))

    def _lacking(self, sequence: Sequence, group: int, start: int, end: int) -> Several[int]:
        """The positions of ``start`` … ``end`` − 1 of a group's table that have no block."""
        table = sequence.tables[group] if group < len(sequence.tables) else []
        if not self._groups[group].window:
            return range(len(table), end)
        return [p for p in range(start, end) if p >= len(table) or table[p] < 0]

    def _nearest(self, wanted: Several[Several[int]]) -> list[list[int]]:
        """As many of the wanted positions as there are blocks, the same in all groups."""
        room = self._pool.num_free
        places = sorted((position, group) for group, positions in enumerate(wanted) for position in positions)
        while room < len(places) and room and places[room - 1][0] == places[room][0]:
            room -= 1
        nearest: list[list[int]] = [[] for _ in self._groups]
        for position, group in places[:room]:
            nearest[group].append(position)
        return nearest

    def _give(self, sequence: Sequence, wanted: Several[Several[int]]) -> bool:
        """Allocate for positions of each group, all or none."""
        blocks = self._pool.allocate(sum(map(len, wanted)))
        if blocks is None:
            return False
        at = 0
        for group, positions in enumerate(wanted):
            given = blocks[at : at + len(positions)]
            at += len(positions)
            sequence.add_blocks(given, group, positions)
        return True

    def _measure(self, sequence: Sequence) -> None:
        """Find out how far the blocks reach."""
        first = sequence.num_computed // self._block_tokens
        ends = []
        for number, table in enumerate(sequence.tables):
            end = len(table)
            if number in self._windowed:
                end = next((p for p in range(first, end) if table[p] < 0), end)
            ends.append(end)
        sequence.num_reserved = min(ends) * self._block_tokens
