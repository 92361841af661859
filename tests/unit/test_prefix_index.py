"""Which worker has how much of a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from tandem.cluster.prefix_index import PrefixIndex
from tandem.cluster.prompt_hashes import PromptHashes
from tandem.core.hashing import block_hashes, root_hash

ROOT = root_hash("f")
HOLDERS = ["cache-a", "cache-b", "tier-b", "node"]
REACH = {"a": ["cache-a", "node"], "b": ["cache-b", "tier-b", "node"], "c": ["cache-c"]}
BLOCKS = [bytes([number]) * 16 for number in range(12)]

blocks = st.lists(st.sampled_from(BLOCKS), max_size=6)
step = st.one_of(
    st.tuples(st.just("apply"), st.sampled_from(HOLDERS), blocks, blocks),
    st.tuples(st.just("forget"), st.sampled_from(HOLDERS), st.just([]), st.just([])),
)


def slow_match(held: Mapping[str, set[bytes]], prompt: list[bytes]) -> dict[str, int]:
    lengths = {}
    for peer, holders in REACH.items():
        has = set().union(*(held.get(holder, set()) for holder in holders))
        length = next((n for n, block in enumerate(prompt) if block not in has), len(prompt))
        if length:
            lengths[peer] = length
    return lengths


def check(found: Mapping[str, int], held: Mapping[str, set[bytes]], prompt: list[bytes]) -> None:
    """What is found is what a slow model finds. Of a peer that has lost a block in the middle it may be more, but not
    more than ends with a block that it has."""
    exact = slow_match(held, prompt)
    assert found.keys() == exact.keys()
    for peer, length in found.items():
        has = set().union(*(held.get(holder, set()) for holder in REACH[peer]))
        assert length >= exact[peer]
        assert prompt[length - 1] in has
        assert length == exact[peer] or not has.isdisjoint(prompt[exact[peer] + 1 :])


@given(st.lists(step, max_size=30), st.permutations(BLOCKS), st.integers(1, 12))
def test_a_match_is_what_a_slow_model_finds(
    steps: list[tuple[str, str, list[bytes], list[bytes]]], prompt: list[bytes], max_blocks: int
) -> None:
    index, held = PrefixIndex(), dict[str, set[bytes]]()
    small = PrefixIndex(max_blocks)
    for each in (index, small):
        for peer, holders in REACH.items():
            each.reach(peer, holders)
    for name, holder, stored, removed in steps:
        if name == "forget":
            held.pop(holder, None)
            index.forget(holder)
            small.forget(holder)
        else:
            held[holder] = (held.get(holder, set()) - set(removed)) | set(stored)
            index.apply(holder, stored, removed)
            small.apply(holder, stored, removed)
        check(index.match(prompt), held, prompt)
        check(index.match(prompt[:3]), held, prompt[:3])
        assert len(index) == len(set().union(*held.values()))
        # One with too little room knows nothing that is not so.
        assert len(small) <= max_blocks
        for peer, length in small.match(prompt).items():
            assert prompt[length - 1] in set().union(*(held.get(holder, set()) for holder in REACH[peer]))


@given(st.lists(st.integers(0, 400), min_size=1, max_size=8), st.integers(1, 400))
def test_every_length_is_found(lengths: list[int], num_blocks: int) -> None:
    """Of peers that have a prompt's beginning, however long, and of prompts as long as nobody's."""
    prompt = [bytes([n % 256, n // 256]) * 8 for n in range(400)]
    index = PrefixIndex()
    for number, length in enumerate(lengths):
        index.reach(f"{number}", [f"{number}"])
        index.apply(f"{number}", prompt[:length], [])
    wanted = {f"{number}": min(length, num_blocks) for number, length in enumerate(lengths) if length}
    assert index.match(prompt[:num_blocks]) == wanted


def test_little_is_hashed_that_nobody_has() -> None:
    prompt = list(range(16 * 1000))
    blocks = block_hashes(prompt, 16, ROOT)
    index = PrefixIndex()
    index.reach("a", ["a"])
    for known, most in ((0, 1), (1, 48), (40, 48), (100, 240), (500, 1000)):
        index.apply("a", blocks[:known], [])
        hashes = Asked(prompt, 16, ROOT, len(blocks))
        assert index.match(hashes) == ({"a": known} if known else {})
        assert hashes.furthest < most
        assert len(hashes.asked) < 30


class Asked(PromptHashes):
    """Notes which are asked for."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.asked: list[int] = []

    @property
    def furthest(self) -> int:
        return max(self.asked)

    def __getitem__(self, block: int) -> bytes:
        self.asked.append(block)
        return super().__getitem__(block)


def test_a_peer_without_holders_is_not_matched() -> None:
    index = PrefixIndex()
    index.reach("a", ["a"])
    index.apply("a", BLOCKS[:2], [])
    index.reach("a", [])
    assert index.match(BLOCKS) == {}
