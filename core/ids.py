"""Names of things that cross processes."""

from __future__ import annotations

import secrets
from typing import NamedTuple

WorkerId = str
"""A worker's place in the cluster, "prefill-0": the same after a restart."""

PeerId = str
"""One life of a process, "prefill-0#3": worker id and incarnation. Never reused."""

RequestId = str
"""What the client sees, "cmpl-5f0c…"; in every log line about the request."""


class TransferId(NamedTuple):
    """One handoff attempt: the reading peer and a number that it never uses twice."""

    reader: PeerId
    number: int


def peer_id(worker: WorkerId, incarnation: int) -> PeerId:
    """The peer id of a worker's ``incarnation``-th life."""
    return f"{worker}#{incarnation}"


def worker_of(peer: PeerId) -> WorkerId:
    """The worker whose life ``peer`` is."""
    return peer.rpartition("#")[0]


def index_of(worker: WorkerId) -> int:
    """A worker's number among those of its role."""
    return int(worker.rpartition("-")[2])


def incarnation_of(peer: PeerId) -> int:
    """The number of the life that ``peer`` is."""
    return int(peer.rpartition("#")[2])


def new_request_id(prefix: str) -> RequestId:
    """A fresh id, 96 random bits, with the prefix that OpenAI's clients expect ("cmpl", "chatcmpl")."""
    return f"{prefix}-{secrets.token_hex(12)}"
