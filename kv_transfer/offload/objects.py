"""Blocks as objects of an S3-compatible store, one record (`record`) each.

Names are PREFIX/SLOT/GENERATION-KEY: of the objects of a slot the one with the highest generation is the slot's, and
what else is there was left by a process that died. The index is in memory, and is found again by listing.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence

import numpy as np

from ...core.clock import Clock
from ...core.errors import ConfigError
from ...core.units import format_bytes
from .base import Notify, Tier
from .bucket import Bucket
from .index import TierIndex
from .keys import KEY_BYTES, TierKey
from .policies import make_policy
from .prefix_claim import InUse, PrefixClaim
from .record import HEADER_BYTES, check, seal
from .threaded import BadBlock, Frames, Lost, Outcome, Record, ThreadedTier, outcome_of

THREADS = 16
_NAME = re.compile(rf"(\d+)/([0-9a-f]{{16}})-([0-9a-f]{{{2 * KEY_BYTES}}})")
_CLAIM = "cluster"


def open_objects(
    bucket: str,
    prefix: str,
    endpoint: str | None,
    capacity_bytes: int,
    block_bytes: int,
    policy: str,
    clock: Clock,
    timeout_s: float,
    notify: Notify,
    name: str = "s3",
    cluster: str = "",
) -> Tier:
    """A tier of objects. Does not wait until what is there has been listed, nor for a store that cannot be reached, for
    longer than a request: as long as it cannot, the tier has nothing.

    Args:
        bucket: it exists.
        prefix: of the objects' names; of this tier alone.
        endpoint: URL of the store; None: Amazon's.
        capacity_bytes: of all objects together.
        block_bytes: of a block.
        policy: one of `policies.POLICIES`.
        clock: for deadlines.
        timeout_s: after which a request counts as failed.
        notify: see `base`.
        name: in logs and metrics.
        cluster: whose workers alone may use what ``prefix`` is in; see `PrefixClaim`. "": anybody.

    Raises:
        ConfigError: boto3 is not installed, the capacity is less than a block, or another cluster uses the prefix.
    """
    num_slots = capacity_bytes // (HEADER_BYTES + block_bytes)
    if num_slots < 1:
        raise ConfigError(f"capacity: {format_bytes(capacity_bytes)} holds no block of {format_bytes(block_bytes)}")
    index = TierIndex(num_slots, make_policy(policy, num_slots))
    io = ObjectIO(Bucket(bucket, endpoint, timeout_s, THREADS), prefix, block_bytes, num_slots, cluster)
    try:
        io.claim()
    except InUse as error:
        io.close()
        raise ConfigError(f"prefix: {error.strerror}", fix="give each cluster a prefix of its own") from None
    except OSError:
        pass  # the tier asks again, until the store can be reached
    return ThreadedTier(name, index, io, THREADS, clock, timeout_s, notify)


class ObjectIO:
    """See `BlockIO`.

    Args:
        bucket: closed with this.
        prefix: without a slash at its end.
        block_bytes: of a block.
        num_slots: how many there are.
        cluster: see `open_objects`.
    """

    def __init__(self, bucket: Bucket, prefix: str, block_bytes: int, num_slots: int, cluster: str = "") -> None:
        self._bucket = bucket
        self._prefix = prefix
        self._block_bytes = block_bytes
        self._num_slots = num_slots
        folder = prefix.rpartition("/")[0]
        self._where = f"s3://{bucket.name}/{folder}"
        self._claim = PrefixClaim(bucket, f"{folder}/{_CLAIM}", cluster) if cluster else None
        # The object of each slot; a slot has one thread at a time.
        self._names: dict[int, str] = {}

    def claim(self) -> None:
        """Hold the prefix for the cluster. Blocks; see `PrefixClaim.take`.

        Raises:
            InUse: another cluster uses it.
            OSError: the store cannot be reached.
        """
        if self._claim is None or self._claim.held:
            return
        try:
            self._claim.take()
        except InUse:
            raise InUse(errno.EBUSY, f"{self._where} is in use by another cluster") from None

    def frames(self) -> Frames:
        """See `BlockIO`. For one object: a request takes long enough."""
        return Frames(np.zeros((1, HEADER_BYTES + self._block_bytes), np.uint8), HEADER_BYTES, self._block_bytes)

    def write(self, records: Sequence[Record], frames: Frames) -> Sequence[Outcome]:
        """See `BlockIO`."""
        return [outcome_of(self._write, records[0], frames.whole[0])]

    def read(self, records: Sequence[Record], frames: Frames) -> Sequence[Outcome]:
        """See `BlockIO`."""
        return [outcome_of(self._read, records[0], frames.whole[0])]

    def erase(self, slot: int, key: TierKey) -> None:
        """See `BlockIO`."""
        self._is_ours()
        self._delete(slot)

    def recover(self) -> Sequence[tuple[int, TierKey, int]]:
        """See `BlockIO`. Removes what no slot is to have."""
        self.claim()
        found: dict[int, tuple[int, TierKey]] = {}
        stale = []
        for name, num_bytes in self._bucket.list(f"{self._prefix}/"):
            match = _NAME.fullmatch(name.removeprefix(f"{self._prefix}/"))
            if match is None:
                continue
            slot, generation, key = int(match[1]), int(match[2], 16), bytes.fromhex(match[3])
            if slot >= self._num_slots or num_bytes != HEADER_BYTES + self._block_bytes:
                stale.append(name)
                continue
            if slot in found:
                older = min(found[slot], (generation, key))
                stale.append(self._name(slot, older[1], older[0]))
            found[slot] = max(found.get(slot, (0, b"")), (generation, key))
        for name in stale:
            self._bucket.delete(name)
        self._names = {slot: self._name(slot, key, generation) for slot, (generation, key) in found.items()}
        return [(slot, key, generation) for slot, (generation, key) in found.items()]

    def close(self) -> None:
        """See `BlockIO`."""
        if self._claim is not None:
            self._claim.close()
        self._bucket.close()

    def _write(self, record: Record, whole: np.ndarray) -> None:
        """What the slot had goes first: the capacity holds at every moment."""
        self._is_ours()
        self._delete(record.slot)
        seal(whole, record.key, record.generation, self._block_bytes)
        name = self._name(*record)
        # Also an object whose writing failed may be there.
        self._names[record.slot] = name
        self._bucket.put(name, whole.tobytes())

    def _read(self, record: Record, whole: np.ndarray) -> None:
        self._is_ours()
        name = self._name(*record)
        body = self._bucket.get(name)
        if body is None:
            raise BadBlock("deleted", "an object is not there any more")
        if len(body) != len(whole):
            raise BadBlock("truncated", f"{name} has {len(body)} bytes, expected {len(whole)}")
        whole[:] = np.frombuffer(body, np.uint8)
        cause, detail = check(whole, record.key, record.generation, self._block_bytes)
        if cause:
            raise BadBlock(cause, f"{name}: {detail}")

    def _name(self, slot: int, key: TierKey, generation: int) -> str:
        return f"{self._prefix}/{slot}/{generation:016x}-{key.hex()}"

    def _delete(self, slot: int) -> None:
        name = self._names.get(slot)
        if name is not None:
            self._bucket.delete(name)
            del self._names[slot]

    def _is_ours(self) -> None:
        """What another cluster may have changed since is looked through again, when it is ours again."""
        if self._claim is not None and not self._claim.held:
            raise Lost(errno.EBUSY, f"{self._where} is not this cluster's any more, or the store was long away")
