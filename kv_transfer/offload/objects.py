"""Blocks as objects of an S3-compatible store, one record (`record`) each, through boto3 (`pip install tandem[s3]`).

Names are PREFIX/SLOT/GENERATION-KEY: of the objects of a slot the one with the highest generation is the slot's, and
what else is there was left by a process that died. The index is in memory, and is found again by listing.
"""

from __future__ import annotations

import errno
import importlib
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np

from ...core.clock import Clock
from ...core.errors import ConfigError
from ...core.units import format_bytes
from .base import Notify, Tier
from .index import TierIndex
from .keys import KEY_BYTES, TierKey
from .policies import make_policy
from .record import HEADER_BYTES, check, seal
from .threaded import BadBlock, Frames, Outcome, Record, ThreadedTier, outcome_of

THREADS = 16
_NAME = re.compile(rf"(\d+)/([0-9a-f]{{16}})-([0-9a-f]{{{2 * KEY_BYTES}}})")

_T = TypeVar("_T")


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
) -> Tier:
    """A tier of objects. Does not wait for the store: while it cannot be reached, the tier has nothing.

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

    Raises:
        ConfigError: boto3 is not installed, or the capacity is less than a block.
    """
    num_slots = capacity_bytes // (HEADER_BYTES + block_bytes)
    if num_slots < 1:
        raise ConfigError(f"capacity: {format_bytes(capacity_bytes)} holds no block of {format_bytes(block_bytes)}")
    index = TierIndex(num_slots, make_policy(policy, num_slots))
    io = ObjectIO(bucket, prefix, endpoint, block_bytes, num_slots, timeout_s)
    return ThreadedTier(name, index, io, THREADS, clock, timeout_s, notify)


class ObjectIO:
    """See `BlockIO`. boto3's clients are thread-safe.

    Args:
        bucket: see `open_objects`, as the others.
        prefix: without a slash at its end.
        endpoint: or None.
        block_bytes: of a block.
        num_slots: how many there are.
        timeout_s: of a request.

    Raises:
        ConfigError: boto3 is not installed, or there is nothing that tells it a region.
    """

    def __init__(
        self, bucket: str, prefix: str, endpoint: str | None, block_bytes: int, num_slots: int, timeout_s: float
    ) -> None:
        try:
            boto3 = importlib.import_module("boto3")
            config = importlib.import_module("botocore.config")
            self._failures: Any = importlib.import_module("botocore.exceptions")
        except ImportError:
            raise ConfigError("kind: s3 needs boto3", fix="pip install 'tandem[s3]'") from None
        settings = config.Config(
            connect_timeout=timeout_s,
            read_timeout=timeout_s,
            retries={"total_max_attempts": 1},
            max_pool_connections=THREADS,
        )
        try:
            self._client: Any = boto3.client("s3", endpoint_url=endpoint, config=settings)
        except (self._failures.BotoCoreError, ValueError) as error:
            raise ConfigError(f"endpoint: {error}") from None
        self._bucket = bucket
        self._prefix = prefix
        self._block_bytes = block_bytes
        self._num_slots = num_slots
        # The object of each slot; a slot has one thread at a time.
        self._names: dict[int, str] = {}

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
        self._delete(slot)

    def recover(self) -> Sequence[tuple[int, TierKey, int]]:
        """See `BlockIO`. Removes what no slot is to have."""
        found: dict[int, tuple[int, TierKey]] = {}
        stale = []
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=f"{self._prefix}/")
        for entry in self._try(lambda: [object_ for page in pages for object_ in page.get("Contents", ())]):
            name = entry["Key"].removeprefix(f"{self._prefix}/")
            match = _NAME.fullmatch(name)
            if match is None:
                continue
            slot, generation, key = int(match[1]), int(match[2], 16), bytes.fromhex(match[3])
            if slot >= self._num_slots or entry["Size"] != HEADER_BYTES + self._block_bytes:
                stale.append(entry["Key"])
                continue
            if slot in found:
                older = min(found[slot], (generation, key))
                stale.append(self._name(slot, older[1], older[0]))
            found[slot] = max(found.get(slot, (0, b"")), (generation, key))
        for name in stale:
            self._try(partial(self._client.delete_object, Bucket=self._bucket, Key=name))
        self._names = {slot: self._name(slot, key, generation) for slot, (generation, key) in found.items()}
        return [(slot, key, generation) for slot, (generation, key) in found.items()]

    def close(self) -> None:
        """See `BlockIO`."""
        self._client.close()

    def _write(self, record: Record, whole: np.ndarray) -> None:
        """What the slot had goes first: the capacity holds at every moment."""
        self._delete(record.slot)
        seal(whole, record.key, record.generation, self._block_bytes)
        name = self._name(*record)
        # Also an object whose writing failed may be there.
        self._names[record.slot] = name
        self._try(lambda: self._client.put_object(Bucket=self._bucket, Key=name, Body=whole.tobytes()))

    def _read(self, record: Record, whole: np.ndarray) -> None:
        name = self._name(*record)
        body = self._try(lambda: self._client.get_object(Bucket=self._bucket, Key=name)["Body"].read())
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
            self._try(lambda: self._client.delete_object(Bucket=self._bucket, Key=name))
            del self._names[slot]

    def _try(self, request: Callable[[], _T]) -> _T:
        """Make a request.

        Raises:
            BadBlock: the object does not exist.
            OSError: anything else.
        """
        try:
            return request()
        except self._failures.ClientError as error:
            code = error.response.get("Error", {}).get("Code", "")
            if code == "NoSuchKey":
                raise BadBlock("deleted", "an object is not there any more") from None
            raise OSError(errno.EIO, str(error)) from None
        except (self._failures.BotoCoreError, self._failures.HTTPClientError) as error:
            raise OSError(errno.EIO, str(error)) from None
