"""What every policy does, and what they share: keys that are pinned stand in no queue."""

from __future__ import annotations

import abc
from typing import Generic, Protocol, TypeVar

Key = bytes
"""Of a block; 16 bytes at least, and as good as random: the sketch of `tinylfu` reads its hashes off it."""

_Place = TypeVar("_Place")


class Policy(Protocol):
    """Orders the keys of one tier; knows neither slots nor bytes. Every call is O(1) amortised. Owned by one thread.

    The tier calls `evict` when it is full, and then `insert` for the key that wanted room.
    """

    def __len__(self) -> int:
        """Keys that it knows, pinned ones included."""
        ...

    def __contains__(self, key: Key) -> bool:
        """Whether it knows a key."""
        ...

    def insert(self, key: Key) -> None:
        """A new key."""
        ...

    def insert_pinned(self, key: Key) -> None:
        """`insert`, and `pin`."""
        ...

    def touch(self, key: Key) -> None:
        """A known key was used."""
        ...

    def pin(self, key: Key) -> None:
        """Take a key out of the order until `unpin`, which is its latest arrival where it stood, and no use."""
        ...

    def unpin(self, key: Key) -> None:
        """Put a pinned key back."""
        ...

    def remove(self, key: Key) -> None:
        """Forget a key, pinned or not, without remembering that it was there."""
        ...

    def evict(self, incoming: Key) -> Key | None:
        """Forget the key that should make room for ``incoming``, and return it. None: all that there are are pinned."""
        ...


class PinningPolicy(abc.ABC, Generic[_Place]):
    """Pins for any policy that can take a key out of its order and put it back.

    A search for a victim so never meets a pinned key, however many there are.
    """

    def __init__(self) -> None:
        self._pinned: dict[Key, _Place] = {}

    def insert_pinned(self, key: Key) -> None:
        """See `Policy`."""
        self.insert(key)
        self.pin(key)

    def pin(self, key: Key) -> None:
        """See `Policy`."""
        self._pinned[key] = self._take(key)

    def unpin(self, key: Key) -> None:
        """See `Policy`."""
        self._put(key, self._pinned.pop(key))

    def touch(self, key: Key) -> None:
        """See `Policy`."""
        if key in self._pinned:
            self.unpin(key)
            self._use(key)
            self.pin(key)
        else:
            self._use(key)

    def remove(self, key: Key) -> None:
        """See `Policy`."""
        if key in self._pinned:
            del self._pinned[key]
        else:
            self._take(key)

    @abc.abstractmethod
    def insert(self, key: Key) -> None:
        """See `Policy`."""

    @abc.abstractmethod
    def _use(self, key: Key) -> None:
        """An unpinned key was used."""

    @abc.abstractmethod
    def _take(self, key: Key) -> _Place:
        """Take a key out of its queue, and say where it was."""

    @abc.abstractmethod
    def _put(self, key: Key, place: _Place) -> None:
        """Put a key at the late end of the queue that it was in."""
