"""Which worker has how much of a prompt."""

from __future__ import annotations

from collections.abc import Mapping

from hypothesis import given
from hypothesis import strategies as st
from tandem.cluster.prefix_index import PrefixIndex

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
        assert index.match(prompt) == slow_match(held, prompt)
        assert index.match(prompt[:3]) == slow_match(held, prompt[:3])
        assert len(index) == len(set().union(*held.values()))
        # One with too little room knows less, and nothing that is not so.
        assert len(small) <= max_blocks
        whole = index.match(prompt)
        assert all(length <= whole[peer] for peer, length in small.match(prompt).items())


def test_no_more_is_asked_for_than_somebody_has() -> None:
    index = PrefixIndex()
    index.reach("a", ["a"])
    index.apply("a", BLOCKS[:2], [])
    asked = []

    def hashes():  # type: ignore[no-untyped-def]
        for block in BLOCKS:
            asked.append(block)
            yield block

    assert index.match(hashes()) == {"a": 2}
    assert asked == BLOCKS[:3]


def test_a_peer_without_holders_is_not_matched() -> None:
    index = PrefixIndex()
    index.reach("a", ["a"])
    index.apply("a", BLOCKS[:2], [])
    index.reach("a", [])
    assert index.match(BLOCKS) == {}
