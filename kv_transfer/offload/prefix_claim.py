"""Whose a prefix of a bucket is: one object in it, which the workers of a cluster renew, as a bucket knows no locks."""

from __future__ import annotations

import errno
import secrets
import threading
import time

from .bucket import Bucket

BEAT_S = 4.0
LEASE_S = 15.0
"""A claim that has not changed for so long is nobody's."""
_LOOK_S = 1.0


class InUse(OSError):
    """Workers of another cluster use the prefix."""


class PrefixClaim:
    """Holds a prefix for a cluster: its workers hold it together. Nobody's clock is compared with another's: what is
    renewed is alive.

    Two clusters that find nothing at the same moment may both believe that it is theirs, for `BEAT_S`; then all workers
    of one know that it is not.

    Args:
        bucket: where.
        name: of the object.
        cluster: a name that no other cluster has.
    """

    def __init__(self, bucket: Bucket, name: str, cluster: str) -> None:
        self._bucket = bucket
        self._name = name
        self._cluster = cluster.encode()
        self._held = self._reached = False
        self._said: bytes | None = None
        self._seen_s = 0.0
        self._closing = threading.Event()
        self._beating: threading.Thread | None = None

    @property
    def held(self) -> bool:
        """Whether it was ours when we last looked, and cannot have run out since."""
        # Another worker of ours may have renewed it a beat before we saw that.
        return self._held and time.monotonic() - self._seen_s < LEASE_S - BEAT_S

    def take(self) -> None:
        """Hold it, from now on. Blocks: for `LEASE_S` where it looks as if it were another's.

        Raises:
            InUse: others renew it.
            OSError: the store cannot be reached.
        """
        theirs, since_s = None, 0.0
        while self._is_foreign(body := self._bucket.get(self._name)):
            if theirs is None:
                theirs, since_s = body, time.monotonic()
            if body != theirs or self._closing.is_set():
                raise InUse(errno.EBUSY, "another cluster uses it")
            if time.monotonic() - since_s >= LEASE_S:
                break
            self._closing.wait(_LOOK_S)
        self._renew()
        if self._is_foreign(self._bucket.get(self._name)):
            raise InUse(errno.EBUSY, "another cluster uses it")
        self._held = self._reached = True
        if self._beating is None:
            self._beating = threading.Thread(target=self._beat, name="prefix-claim", daemon=True)
            self._beating.start()

    def close(self) -> None:
        """Give it free, if the store can be reached; workers of the cluster that are still there take it again. Blocks
        for some requests. Idempotent.
        """
        if self._closing.is_set():
            return
        self._closing.set()
        if self._beating is not None:
            self._beating.join()
        if self.held and self._reached:
            try:
                if not self._is_foreign(self._bucket.get(self._name)):
                    self._bucket.delete(self._name)
            except OSError:
                return  # it runs out by itself

    def _beat(self) -> None:
        while not self._closing.wait(BEAT_S):
            if not self.held:
                # Others may have had it: until it is taken again, and looked through, it is not ours.
                self._held = False
                continue
            try:
                body = self._bucket.get(self._name)
                if self._is_foreign(body):
                    self._held = False
                elif body in (None, self._said):
                    self._renew()
                else:
                    # Another worker of ours has renewed it meanwhile.
                    self._said, self._seen_s = body, time.monotonic()
                self._reached = True
            except OSError:
                self._reached = False  # if this lasts, `held` says so

    def _renew(self) -> None:
        began_s = time.monotonic()
        body = self._cluster + b"\n" + secrets.token_hex(8).encode()
        self._bucket.put(self._name, body)
        self._said, self._seen_s = body, began_s

    def _is_foreign(self, body: bytes | None) -> bool:
        return body is not None and body.rpartition(b"\n")[0] != self._cluster
