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


class KeptDrain(msgspec.Struct, frozen=True):
    """Somebody waits for a worker to end, or to be back."""

    key: str
    """Of his call; he may ask again with it."""
    worker: WorkerId
    life: PeerId
    """That ends."""
    restart: bool


class KeptScale(msgspec.Struct, frozen=True):
    """What has been answered to a call."""

    key: str
    started: list[WorkerId]
    drained: list[WorkerId]


class KeptRestart(msgspec.Struct, frozen=True):
    """See `rolling_restart.RollingRestart`."""

    key: str
    """Of the call that began it."""
    grace_s: float
    to_come: list[WorkerId]
    """The present one first."""
    done: list[WorkerId] = []
    """Those that serve again."""
    after: PeerId = ""
    """The life of the present one that was asked to end; "": it was not yet."""
    spare: WorkerId = ""
    """Lives meanwhile; "": nobody does."""
    outcome: str | None = None
    """None: it goes on; "": all serve again; else why it ended."""


class ScalingState(msgspec.Struct, frozen=True):
    """See `scaling.Scaling`."""

    drains: list[KeptDrain]
    """The last ones."""
    scales: list[KeptScale]
    """The last ones."""
    restart: KeptRestart | None
    """The last one."""
    spares: list[WorkerId]
    """Workers that live until another of their pool serves."""


class KeptGroup(msgspec.Struct, frozen=True):
    """Workers that met to share experts, and where."""

    peers: list[PeerId]
    rendezvous: str


class KeptLearned(msgspec.Struct, frozen=True):
    """What a group of workers that share experts has learned."""

    role: str
    number: int
    """Of the group."""
    learned: bytes


class ControllerState(msgspec.Struct, frozen=True):
    """See `controller.Controller`."""

    version: int
    num_events: int
    events: list[KeptEvent]
    """The last ones."""
    workers: list[KeptWorker]
    groups: list[KeptGroup]
    learned: list[KeptLearned]


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
    scaling: ScalingState
    host_tiers: dict[str, Member]
    """By node, those that other nodes may read."""
    nodes: dict[str, KeptNode]
    places: dict[WorkerId, KeptPlace]
    num_supervisors: int
