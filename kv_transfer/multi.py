"""Several sources of one sequence's KV, asked one after another: each block comes from exactly one. Sans-IO.

::

    prefix cache ─ delivers [0, a) ─► a peer ─ delivers [a, b), fails ─► another ─ delivers [b, n)

Sources deliver prefixes: what one has delivered is kept, and the next is asked for what follows, from a whole block on.
A source that has nothing delivers nothing; one that fails in the middle hands the rest to the next. A cache in slower
memory is one more source between the prefix cache and the peers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Generic, NamedTuple, TypeVar

from ..core.errors import IllegalTransition

_Source = TypeVar("_Source")


class Part(NamedTuple, Generic[_Source]):
    """Tokens ``start`` … ``stop`` − 1, and where their KV came from."""

    source: _Source
    start: int
    stop: int


class MultiConnector(Generic[_Source]):
    """The sources of one sequence's KV.

    Args:
        num_tokens: of the sequence.
        block_tokens: of our blocks.
        sources: best first; one is taken when it is asked, so that the order may depend on what has happened. What the
            last does not deliver, nobody does: it should be one that cannot fail.
    """

    def __init__(self, num_tokens: int, block_tokens: int, sources: Iterable[_Source]) -> None:
        self.parts: list[Part[_Source]] = []
        """What has been delivered, in order and without gaps: whole blocks but for the sequence's last."""
        self._num_tokens = num_tokens
        self._block_tokens = block_tokens
        self._sources = iter(sources)
        self._asked: list[_Source] = []

    @property
    def num_here(self) -> int:
        """Tokens whose KV has been delivered."""
        return self.parts[-1].stop if self.parts else 0

    def ask(self) -> _Source | None:
        """The source that is to deliver the KV of all tokens from `num_here` on.

        Returns:
            None when nothing lacks, or nobody is left.

        Raises:
            IllegalTransition: the one before has not ended.
        """
        if self._asked:
            raise IllegalTransition(f"{self._asked[0]} has not ended, and another source is asked")
        if self.num_here < self._num_tokens:
            self._asked = list(itertools.islice(self._sources, 1))
        return self._asked[0] if self._asked else None

    def ended(self, num_tokens: int, *, complete: bool = True) -> None:
        """The source that was asked last will deliver no more.

        Args:
            num_tokens: of the sequence's first tokens, those whose KV is here. What is not whole blocks is forgotten.
            complete: whether it told all that a source is asked for, should it have delivered all; else the last block
                has to come again.

        Raises:
            IllegalTransition: none was asked.
        """
        if not self._asked:
            raise IllegalTransition("a source ends that was not asked")
        [source] = self._asked
        self._asked = []
        stop = min(num_tokens, self._num_tokens)
        if stop < self._num_tokens or not complete:
            stop = min(stop, self._num_tokens - 1) // self._block_tokens * self._block_tokens
        if stop > self.num_here:
            self.parts.append(Part(source, self.num_here, stop))
