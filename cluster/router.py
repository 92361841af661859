"""Which workers serve a request. Views are a little stale; a wrong choice costs time, never correctness."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from ..core.ids import PeerId
from ..core.messages import Member, Membership, Report


class Placement(NamedTuple):
    """Who decodes, and who computes the prompt: "" for the decoding worker itself."""

    decode: PeerId
    prefill: PeerId


class Router:
    """Knows the members, their reports, and what this gateway has sent them. Owned by one thread; nothing blocks.

    Args:
        policy: "least_loaded" or "round_robin".
    """

    def __init__(self, policy: str) -> None:
        self._policy = policy
        self._members: dict[PeerId, Member] = {}
        self._reports: dict[PeerId, Report] = {}
        self._silent: set[PeerId] = set()
        """Members that could not be reached, and have not said a word since: stopped, or behind a cut link."""
        self._decode_load: dict[PeerId, int] = {}
        """Outputs that this gateway waits for, by worker."""
        self._prefill_load: dict[PeerId, int] = {}
        """Prompt tokens that this gateway waits for, by worker."""
        self._turns = {"decode": itertools.count(), "prefill": itertools.count()}

    def follow(self, membership: Membership) -> None:
        """The members have changed."""
        self._members = {member.peer: member for member in membership.members if member.ready}
        self._silent &= self._members.keys()
        for table in (self._reports, self._decode_load, self._prefill_load):
            for peer in table.keys() - self._members.keys():
                del table[peer]

    def forget(self, peer: PeerId) -> None:
        """A worker cannot be reached, whatever the membership says, until it reports again."""
        if peer in self._members:
            self._silent.add(peer)

    def report(self, peer: PeerId, report: Report) -> None:
        """A worker tells its load."""
        if peer in self._members:
            self._reports[peer] = report
            self._silent.discard(peer)

    def members(self) -> list[Member]:
        """Those that can be routed to, gateways left out."""
        return [member for member in self._members.values() if self._is_there(member.peer) and member.role != "gateway"]

    def place(self) -> Placement | None:
        """Workers for a request, or None when nobody decodes at the moment."""
        decoders = [member.peer for member in self.members() if member.role in ("decode", "colocated")]
        if not decoders:
            return None
        decode = self._pick("decode", sorted(decoders), self._decode_load)
        if self._members[decode].role == "colocated":
            return Placement(decode, "")
        report = self._reports.get(decode)
        reachable = [peer for peer in (report.peers if report else ()) if self._is_there(peer)]
        return Placement(decode, self._pick("prefill", sorted(reachable), self._prefill_load) if reachable else "")

    def routable(self, wants_prefill: bool) -> bool:
        """Whether a request could be served now, on separate workers if ``wants_prefill``."""
        return any(
            not wants_prefill or any(self._is_there(prefill) for prefill in self._reports[member.peer].peers)
            for member in self.members()
            if member.role in ("decode", "colocated") and member.peer in self._reports
        )

    def sent(self, placement: Placement, num_outputs: int, num_tokens: int) -> None:
        """A request has been sent."""
        self._add(self._decode_load, placement.decode, num_outputs)
        self._add(self._prefill_load, placement.prefill, num_tokens)

    def prompt_done(self, placement: Placement, num_tokens: int) -> None:
        """A request's prompt is computed."""
        self._add(self._prefill_load, placement.prefill, -num_tokens)

    def done(self, placement: Placement, num_outputs: int) -> None:
        """A request's outputs are over."""
        self._add(self._decode_load, placement.decode, -num_outputs)

    def _is_there(self, peer: PeerId) -> bool:
        return peer in self._members and peer not in self._silent

    def _pick(self, pool: str, peers: list[PeerId], load: dict[PeerId, int]) -> PeerId:
        turn = next(self._turns[pool])
        if self._policy == "round_robin":
            return peers[turn % len(peers)]
        # Ties go round, so that an idle cluster is used evenly.
        return min(
            (peers[(turn + i) % len(peers)] for i in range(len(peers))),
            key=lambda peer: (load.get(peer, 0), self._waiting(peer)),
        )

    def _waiting(self, peer: PeerId) -> int:
        report = self._reports.get(peer)
        return report.waiting + report.running if report else 0

    def _add(self, load: dict[PeerId, int], peer: PeerId, amount: int) -> None:
        if peer:
            load[peer] = max(0, load.get(peer, 0) + amount)
