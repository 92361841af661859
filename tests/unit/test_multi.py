"""Sources asked in order: whatever they deliver and wherever they fail, every block comes from exactly one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tandem.core.errors import IllegalTransition
from tandem.kv_transfer.multi import MultiConnector, Part


@given(
    st.integers(1, 60),
    st.integers(1, 9),
    st.lists(st.tuples(st.integers(0, 70), st.booleans()), max_size=6),
)
def test_every_block_comes_from_exactly_one_source(
    num_tokens: int, block_tokens: int, deliveries: list[tuple[int, bool]]
) -> None:
    """The last source delivers everything; the others something, or nothing."""
    ends = [*deliveries, (num_tokens, True)]
    chain = MultiConnector(num_tokens, block_tokens, range(len(ends)))
    writers: dict[int, list[int]] = {}
    asked = []
    while (source := chain.ask()) is not None:
        start, (end, complete) = chain.num_here, ends[source]
        asked.append(source)
        assert start % block_tokens == 0, "a block would come from two"
        for token in range(start, num_tokens):  # it may write anywhere from there on
            writers[token] = [*writers.get(token, []), source]
        chain.ended(max(start, end), complete=complete)
        assert chain.num_here >= start, "something was lost"
        assert chain.num_here <= max(start, end), "something was made up"
    assert asked == list(range(len(asked)))
    assert chain.num_here == num_tokens
    assert [part.start for part in chain.parts] == [0, *(part.stop for part in chain.parts[:-1])]
    of_token = {token: part.source for part in chain.parts for token in range(part.start, part.stop)}
    assert sorted(of_token) == list(range(num_tokens))
    for block in range(0, num_tokens, block_tokens):
        tokens = range(block, min(block + block_tokens, num_tokens))
        assert len({of_token[token] for token in tokens}) == 1
        # Nobody wrote over it after the one whose it is.
        assert all(writers[token][-1] == of_token[token] for token in tokens)


def test_sources_are_taken_when_they_are_asked() -> None:
    taken = []

    def sources() -> object:
        for name in ("cache", "peer", "here"):
            taken.append(name)
            yield name

    chain = MultiConnector(10, 4, sources())  # type: ignore[arg-type]
    assert chain.ask() == "cache"
    assert taken == ["cache"]
    chain.ended(9)
    assert chain.ask() == "peer"
    with pytest.raises(IllegalTransition, match="has not ended"):
        chain.ask()
    chain.ended(10, complete=False)
    assert chain.parts == [Part("cache", 0, 8)]
    assert chain.ask() == "here"
    chain.ended(10)
    assert chain.ask() is None
    assert chain.parts == [Part("cache", 0, 8), Part("here", 8, 10)]
    with pytest.raises(IllegalTransition, match="not asked"):
        chain.ended(10)


def test_nobody_is_left() -> None:
    chain = MultiConnector(10, 4, ["cache"])
    assert chain.ask() == "cache"
    chain.ended(3)
    assert chain.ask() is None
    assert chain.num_here == 0
