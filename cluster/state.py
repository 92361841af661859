"""What a life of the controller keeps for its next one: what cannot be asked of the living. MessagePack, held by the
keeper."""

from __future__ import annotations

import msgspec

from ..core.ids import PeerId, WorkerId
from ..core.messages import Member
from ..core.wire import ClusterKeys
from .control.credentials import Credentials


class KeptWorker(msgspec.Struct, frozen=True):
    """See `controller.Desired`."""

    worker: WorkerId
    role: str
    incarnation: int
    wanted: bool
    grace_s: float | None
    phase: str
    member: Member | None


class KeptEvent(msgspec.Struct, frozen=True):
    """See `controller.Event`."""

    number: int
    at_s: float
    text: str


class KeptGroup(msgspec.Struct, frozen=True):
    """Workers that met to share experts, and where."""

    peers: list[PeerId]
    rendezvous: str


class ControllerState(msgspec.Struct, frozen=True):
    """See `controller.Controller`."""

    version: int
    num_events: int
    events: list[KeptEvent]
    """The last ones."""
    workers: list[KeptWorker]
    groups: list[KeptGroup]


class KeptNode(msgspec.Struct, frozen=True):
    """Where a node's supervisor listens."""

    supervisor: str
    address: str
    port: int


class KeptPlace(msgspec.Struct, frozen=True):
    """Where a process lives."""

    peer: PeerId
    node: str


class State(msgspec.Struct, frozen=True):
    """Everything."""

    keys: ClusterKeys
    control: Credentials | None
    controller: ControllerState
    host_tiers: dict[str, Member]
    """By node, those that other nodes may read."""
    nodes: dict[str, KeptNode]
    places: dict[WorkerId, KeptPlace]
    num_supervisors: int
