"""Which block a full tier gives up: policies by name, and strict priorities over any of them."""

from __future__ import annotations

from collections.abc import Callable

from ....core.errors import ConfigError
from .arc import ARC
from .base import Key, Policy
from .lfu import LFU
from .lru import LRU
from .s3fifo import S3FIFO
from .tinylfu import TinyLFU

POLICIES: dict[str, Callable[[int], Policy]] = {
    "lru": LRU,
    "lfu": LFU,
    "arc": ARC,
    "s3fifo": S3FIFO,
    "tinylfu": TinyLFU,
}
"""Name → constructor, which takes the number of keys that the tier has room for."""


def make_policy(name: str, capacity: int) -> Priorities:
    """A policy by name, with priorities.

    Args:
        name: one of `POLICIES`.
        capacity: keys that the tier has room for, ≥ 1.

    Raises:
        ConfigError: there is no such policy.
    """
    if name not in POLICIES:
        raise ConfigError(f"policy: {name} is not known", fix=f"one of {', '.join(POLICIES)}")
    return Priorities(lambda: POLICIES[name](capacity))


class Priorities:
    """One policy for each priority that occurs. A key goes only when no unpinned key of lower priority is left, and
    never for one of lower priority than its own. O(priorities in use) where the policy is O(1). Owned by one thread.

    Args:
        make: a policy for one priority; each is told the whole tier's capacity.
    """

    def __init__(self, make: Callable[[], Policy]) -> None:
        self._make = make
        self._levels: dict[int, Policy] = {}
        self._order: list[int] = []
        self._only: Policy | None = None
        """What all keys are in, as long as only one priority has occurred."""

    def __len__(self) -> int:
        return sum(len(level) for level in self._levels.values())

    def __contains__(self, key: Key) -> bool:
        return any(key in level for level in self._levels.values())

    def insert(self, key: Key, priority: int = 0) -> None:
        """A new key, for which there is room."""
        self._at(priority).insert(key)

    def insert_pinned(self, key: Key, priority: int = 0) -> None:
        """`insert`, and `pin`."""
        self._at(priority).insert_pinned(key)

    def touch(self, key: Key) -> None:
        """A key was used."""
        (self._of(key) if self._only is None else self._only).touch(key)

    def pin(self, key: Key) -> None:
        """Keep a key from going. Once a key, until `unpin`."""
        (self._of(key) if self._only is None else self._only).pin(key)

    def unpin(self, key: Key) -> None:
        """A pinned key may go again."""
        (self._of(key) if self._only is None else self._only).unpin(key)

    def remove(self, key: Key) -> None:
        """Forget a key, pinned or not: its content is gone."""
        (self._of(key) if self._only is None else self._only).remove(key)

    def evict(self, incoming: Key, priority: int = 0) -> Key | None:
        """Choose the key that makes room for another, and forget it; None: all are pinned, or of higher priority."""
        for number in self._order:
            if number > priority:
                return None
            victim = self._levels[number].evict(incoming)
            if victim is not None:
                return victim
        return None

    def _of(self, key: Key) -> Policy:
        return next(level for level in self._levels.values() if key in level)

    def _at(self, priority: int) -> Policy:
        level = self._levels.get(priority)
        if level is None:
            level = self._levels[priority] = self._make()
            self._order = sorted(self._levels)
            self._only = level if len(self._order) == 1 else None
        return level
