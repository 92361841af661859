"""What an operator does to a worker's cached KV: clear a tenant's, or everybody's; keep some prompts' beginnings.

A pin in the prefix cache is a preference: other blocks are reused first, but nobody waits because of it. In tiers it is
kept to the word, for what they have at the time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..core.clock import Clock
from ..core.errors import RequestError
from ..core.hashing import BlockHash, block_hashes, root_hash
from ..core.kv_messages import KVClear, KVPin, KVUnpin
from .block_pool import BlockPool
from .offloader import Offloader

_MOST_PINS = 1024
_PINNED_SHARE = 2
"""At most one block of so many of the prefix cache is pinned."""


class _Pin(NamedTuple):
    salt: str
    hashes: list[BlockHash]
    until_s: float | None


class KVControl:
    """See the module. Owned by the engine thread; nothing blocks.

    Args:
        pool: the prefix cache.
        offloader: the tiers.
        fingerprint: of the model, root of the block hashes.
        block_tokens: tokens of a block.
        clock: tells the time.
    """

    def __init__(
        self, pool: BlockPool, offloader: Offloader[Any], fingerprint: str, block_tokens: int, clock: Clock
    ) -> None:
        self._pool = pool
        self._offloader = offloader
        self._fingerprint = fingerprint
        self._block_tokens = block_tokens
        self._clock = clock
        # By the last block's hash, which names all before it.
        self._pins: dict[BlockHash, _Pin] = {}

    def carry_out(self, order: KVClear | KVPin | KVUnpin) -> int:
        """Do what an operator wants. Returns the number of blocks, see `KVControlled`.

        Raises:
            RequestError: it cannot be done.
        """
        match order:
            case KVClear():
                return self._clear(order.salt)
            case KVPin():
                return self._pin(order)
            case _:
                return self._unpin(order)

    def next_due_s(self) -> float | None:
        """When the next pin ends by itself, on the monotonic clock."""
        return min((pin.until_s for pin in self._pins.values() if pin.until_s is not None), default=None)

    def poll(self, now_s: float) -> None:
        """End the pins whose time is over."""
        if self._pins:
            over = [end for end, pin in self._pins.items() if pin.until_s is not None and pin.until_s <= now_s]
            if over:
                self._end(over)

    def _clear(self, salt: str | None) -> int:
        root = None if salt is None else root_hash(self._fingerprint, salt)
        self._end([end for end, pin in self._pins.items() if salt is None or pin.salt == salt])
        self._offloader.clear(salt, root)
        return self._pool.clear(root)

    def _pin(self, order: KVPin) -> int:
        hashes = block_hashes(order.tokens, self._block_tokens, root_hash(self._fingerprint, order.salt))
        if not hashes:
            raise RequestError(
                f"a prompt of {len(order.tokens)} tokens fills no block of {self._block_tokens}", fix="pin a longer one"
            )
        self._end([hashes[-1]])  # a second pin counts from now
        num_pinned = len(set().union(hashes, *(pin.hashes for pin in self._pins.values())))
        if len(self._pins) >= _MOST_PINS or num_pinned > self._pool.num_blocks // _PINNED_SHARE:
            raise RequestError(
                f"{num_pinned} blocks of {len(self._pins) + 1} prompts would be pinned; the limit is "
                f"{self._pool.num_blocks // _PINNED_SHARE} blocks of {_MOST_PINS} prompts",
                fix="unpin others first",
            )
        until_s = self._clock.monotonic_s() + order.ttl_s if order.ttl_s else None
        self._pins[hashes[-1]] = _Pin(order.salt, hashes, until_s)
        self._offloader.pin(order.salt, hashes, on=True)
        self._keep()
        return len(hashes)

    def _unpin(self, order: KVUnpin) -> int:
        if order.tokens:
            hashes = block_hashes(order.tokens, self._block_tokens, root_hash(self._fingerprint, order.salt or ""))
            return self._end(hashes[-1:])
        return self._end([end for end, pin in self._pins.items() if order.salt is None or pin.salt == order.salt])

    def _end(self, ends: list[BlockHash]) -> int:
        """End pins; unknown ones are ignored. Returns how many blocks they had."""
        ended = [self._pins.pop(end) for end in ends if end in self._pins]
        for pin in ended:
            self._offloader.pin(pin.salt, pin.hashes, on=False)
        if ended:
            self._keep()
        return sum(len(pin.hashes) for pin in ended)

    def _keep(self) -> None:
        self._pool.pin(key for pin in self._pins.values() for key in pin.hashes)
