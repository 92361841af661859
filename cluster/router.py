"""Which workers serve a request. Views are a little stale; a wrong choice costs time, never correctness."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..core.hashing import root_hash
from ..core.ids import PeerId
from ..core.messages import Member, Membership, Report
from ..core.urgency import LEAST, LEVELS
from .kv_view import NOTHING, Held, KVView

_MOVE_SHARE = 1 / 16
"""What a token's KV costs that is moved from elsewhere, against a token that is computed."""
_OUTPUT_TOKENS = 64
"""What an output in flight costs whoever comes to the same worker, in prompt tokens to compute."""
_CROWDING = 6
"""How much dearer computing a token becomes when all workers have prompts to compute, and not only the one that is
asked: what it computes without need, everybody behind waits for."""
_BEGINNING_TOKENS = 256
"""Prompts that are equal so far belong together."""
_BALANCE = 1.25
"""Of the mean load: more than this, and a few requests, no worker gets for prompts that belong together."""
_FEW = 4


class Placement(NamedTuple):
    """Who decodes, and who computes the prompt: "" for the decoding worker itself."""

    decode: PeerId
    prefill: PeerId
    num_left: int = 0
    """Prompt tokens that have to be computed, as far as is known."""


class _Others(NamedTuple):
    """What a worker has from other gateways, going by its last report, that comes before requests of a level."""

    outputs: int
    tokens: int


class _Prompt(NamedTuple):
    num_tokens: int
    held: Mapping[PeerId, Held]
    beginning: bytes


class _Load(NamedTuple):
    """What a worker has to do before a request of a level that comes to it now; the first decides."""

    cost: int
    """In prompt tokens to compute."""
    waiting: int
    """Requests, going by its report."""


_NO_OTHERS = (_Others(0, 0),) * len(LEVELS)


class _Costs:
    """Of a level, the load of each worker by pool; brought up to date when somebody asks, so that a decision weighs few
    of many workers."""

    def __init__(self) -> None:
        self.decode: dict[PeerId, _Load] = {}
        self.prefill: dict[PeerId, _Load] = {}
        self.stale: set[PeerId] = set()


class Router:
    """Knows the members, their reports, and what this gateway has sent them. Owned by one thread; nothing blocks.

    Args:
        policy: one of `core.config.RoutingConfig.policy`.
        view: what workers hold, for "kv_aware".
    """

    def __init__(self, policy: str, view: KVView | None = None) -> None:
        self._policy = policy
        self._view = view
        self._members: dict[PeerId, Member] = {}
        self._reports: dict[PeerId, Report] = {}
        self._silent: set[PeerId] = set()
        """Members that could not be reached, and have not said a word since: stopped, or behind a cut link."""
        self._decode_load: list[dict[PeerId, int]] = [{} for _ in LEVELS]
        """Outputs that this gateway waits for, by level before whose requests they come, and worker."""
        self._prefill_load: list[dict[PeerId, int]] = [{} for _ in LEVELS]
        """Prompt tokens that this gateway waits for, by level before whose requests they come, and worker that computes
        them."""
        self._others: dict[PeerId, Sequence[_Others]] = {}
        """By level."""
        self._costs = [_Costs() for _ in LEVELS]
        self._num_computing = 0
        """Workers that compute prompts."""
        self._busy: set[PeerId] = set()
        """Those of them that have some to compute, of whatever level."""
        self._decoders: list[PeerId] | None = None
        """Sorted; None: to be looked for again."""
        self._readable: dict[PeerId, list[PeerId]] = {}
        """Of decode workers, the prefill workers that they can read from, sorted; looked for when they are missing."""
        self._turns = {"decode": itertools.count(), "prefill": itertools.count()}

    def follow(self, membership: Membership) -> None:
        """The members have changed."""
        self._members = {member.peer: member for member in membership.members if member.ready}
        self._silent &= self._members.keys()
        tables: list[dict[PeerId, Any]] = [self._reports, self._others, *self._decode_load, *self._prefill_load]
        for table in tables:
            for peer in table.keys() - self._members.keys():
                del table[peer]
        self._costs = [_Costs() for _ in LEVELS]
        self._num_computing = sum(member.role in ("prefill", "colocated") for member in self._members.values())
        self._busy.clear()
        for peer in self._members:
            self._weigh(peer)
        self._look_again()

    def forget(self, peer: PeerId) -> None:
        """A worker cannot be reached, whatever the membership says, until it reports again."""
        if peer in self._members:
            self._silent.add(peer)
            self._look_again()

    def report(self, peer: PeerId, report: Report) -> None:
        """A worker tells its load."""
        if peer in self._members:
            before = self._reports.get(peer)
            if peer in self._silent or before is None or before.peers != report.peers:
                self._look_again()
            self._reports[peer] = report
            others = []
            for level, (decode, prefill) in enumerate(zip(self._decode_load, self._prefill_load, strict=True)):
                outputs, tokens = report.before(level)
                others.append(_Others(max(0, outputs - decode.get(peer, 0)), max(0, tokens - prefill.get(peer, 0))))
            self._others[peer] = others
            self._silent.discard(peer)
            self._weigh(peer)

    def members(self) -> list[Member]:
        """Those that can be routed to, gateways left out."""
        return [member for member in self._members.values() if self._is_there(member.peer) and member.role != "gateway"]

    def place(
        self, tokens: Sequence[int] = (), salt: str = "", among: Sequence[PeerId] = (), level: int = LEAST
    ) -> Placement | None:
        """Workers for a request, or None when nobody decodes at the moment.

        Args:
            tokens: its prompt.
            salt: its tenant's.
            among: decode workers that are better than all others, if they are there.
            level: of `core.urgency`: for "kv_aware", what is less urgent and has not begun counts half.
        """
        if self._decoders is None:
            self._decoders = sorted(m.peer for m in self.members() if m.role in ("decode", "colocated"))
        if not self._decoders:
            return None
        prompt = self._look_at(tokens, salt)
        decoders = [peer for peer in self._decoders if peer in among] if among else []
        decode = self._pick("decode", decoders or self._decoders, self._decode_load[LEAST], prompt, level)
        prefill = ""
        if self._members[decode].role != "colocated":
            readable = self._readable.get(decode)
            if readable is None:
                report = self._reports.get(decode)
                readable = sorted(peer for peer in (report.peers if report else ()) if self._is_there(peer))
                self._readable[decode] = readable
            if readable:
                prefill = self._pick("prefill", readable, self._prefill_load[LEAST], prompt, level)
        held = prompt.held.get(prefill or decode, NOTHING).with_tiers
        return Placement(decode, prefill, len(tokens) - held)

    def routable(self, wants_prefill: bool) -> bool:
        """Whether a request could be served now, on separate workers if ``wants_prefill``."""
        return any(
            not wants_prefill or any(self._is_there(prefill) for prefill in self._reports[member.peer].peers)
            for member in self.members()
            if member.role in ("decode", "colocated") and member.peer in self._reports
        )

    def sent(self, placement: Placement, num_outputs: int, num_tokens: int, level: int = LEAST) -> None:
        """A request of a level of `core.urgency` has been sent."""
        self._add(self._decode_load[level:], placement.decode, num_outputs)
        self._add(self._prefill_load[level:], placement.prefill or placement.decode, num_tokens)

    def prompt_done(self, placement: Placement, num_tokens: int, level: int = LEAST) -> None:
        """A request's prompt is computed."""
        self._add(self._prefill_load[level:], placement.prefill or placement.decode, -num_tokens)

    def begun(self, placement: Placement, num_outputs: int, level: int = LEAST) -> None:
        """A request's outputs have begun: no other goes before them any more, and they are of level 0."""
        self._add(self._decode_load[:level], placement.decode, num_outputs)

    def done(self, placement: Placement, num_outputs: int, level: int = LEAST) -> None:
        """A request's outputs are over."""
        self._add(self._decode_load[level:], placement.decode, -num_outputs)

    def _is_there(self, peer: PeerId) -> bool:
        return peer in self._members and peer not in self._silent

    def _look_at(self, tokens: Sequence[int], salt: str) -> _Prompt:
        """What the policy wants to know of a prompt."""
        held: Mapping[PeerId, Held] = {}
        beginning = b""
        if self._policy == "kv_aware" and self._view is not None:
            held = self._view.match(tokens, salt)
        elif self._policy == "prefix_hash":
            text = ",".join(map(str, tokens[:_BEGINNING_TOKENS]))
            beginning = hashlib.blake2b(text.encode(), key=root_hash("", salt)).digest()
        return _Prompt(len(tokens), held, beginning)

    def _pick(self, pool: str, peers: list[PeerId], load: dict[PeerId, int], prompt: _Prompt, level: int) -> PeerId:
        turn = next(self._turns[pool])
        if self._policy == "round_robin":
            return peers[turn % len(peers)]
        if self._policy == "prefix_hash":
            return self._pick_by_hash(peers, load, prompt, prompt.num_tokens if pool == "prefill" else 1)
        # Ties go round, so that an idle cluster is used evenly.
        start = turn % len(peers)
        turned = peers[start:] + peers[:start]
        if self._policy == "kv_aware":
            costs = self._costs_of(pool, level)
            # Of those that have nothing of the prompt, only the least loaded can be better than the rest.
            least = min(turned, key=costs.__getitem__)
            if not prompt.held:
                return least
            weight = 1 + _CROWDING * len(self._busy) / max(self._num_computing, 1)
            weighed = [peer for peer in turned if peer in prompt.held or peer == least]
            return min(weighed, key=lambda peer: (self._cost(pool, peer, costs, prompt, weight), costs[peer].waiting))
        return min(turned, key=lambda peer: (load.get(peer, 0), self._waiting(peer)))

    def _cost(self, pool: str, peer: PeerId, costs: Mapping[PeerId, _Load], prompt: _Prompt, weight: float) -> float:
        """What it takes until a worker has a prompt's KV, those before it included, in prompt tokens to compute; what
        it computes counts ``weight`` times."""
        in_cache, with_tiers = prompt.held.get(peer, NOTHING)
        cost = costs[peer].cost
        if pool == "decode" and self._members[peer].role == "decode":
            return _MOVE_SHARE * (prompt.num_tokens - in_cache) + cost
        return weight * (prompt.num_tokens - with_tiers) + _MOVE_SHARE * (with_tiers - in_cache) + cost

    def _weigh(self, peer: PeerId) -> None:
        """What a worker has to do has changed."""
        if self._members[peer].role in ("prefill", "colocated"):
            _, tokens = self._before(peer, LEAST)
            (self._busy.add if tokens else self._busy.discard)(peer)
        for costs in self._costs:
            costs.stale.add(peer)

    def _costs_of(self, pool: str, level: int) -> dict[PeerId, _Load]:
        """What workers have to do before a request of a level. Of what is less urgent, half counts: it does not
        make the request wait, but is made to wait by it."""
        costs = self._costs[level]
        for peer in costs.stale:
            (outputs, tokens), (all_outputs, all_tokens) = self._before(peer, level), self._before(peer, LEAST)
            waiting, queued = self._waiting(peer), (tokens + all_tokens) // 2
            cost = _OUTPUT_TOKENS * (outputs + all_outputs) // 2
            costs.prefill[peer] = _Load(queued, waiting)
            costs.decode[peer] = _Load(cost if self._members[peer].role == "decode" else cost + queued, waiting)
        costs.stale.clear()
        return costs.decode if pool == "decode" else costs.prefill

    def _before(self, peer: PeerId, level: int) -> tuple[int, int]:
        """Outputs and prompt tokens that come before a request of a level."""
        others = self._others.get(peer, _NO_OTHERS)[level]
        outputs, tokens = self._decode_load[level].get(peer, 0), self._prefill_load[level].get(peer, 0)
        return outputs + others.outputs, tokens + others.tokens

    def _look_again(self) -> None:
        """Who can be reached has changed."""
        self._decoders = None
        self._readable.clear()

    def _pick_by_hash(self, peers: list[PeerId], load: dict[PeerId, int], prompt: _Prompt, size: int) -> PeerId:
        """Rendezvous hashing (Thaler and Ravishankar 1998), with a bound on the load (Mirrokni et al. 2016,
        arXiv:1608.01350): equal beginnings meet, and when a worker comes or goes, only its own move."""

        def weight(peer: PeerId) -> bytes:
            return hashlib.blake2b(peer.encode(), key=prompt.beginning, digest_size=8).digest()

        most = _BALANCE * sum(load.get(peer, 0) for peer in peers) / len(peers) + _FEW * size
        fitting = [peer for peer in peers if load.get(peer, 0) <= most]
        return max(fitting, key=weight)

    def _waiting(self, peer: PeerId) -> int:
        report = self._reports.get(peer)
        return report.waiting + report.running if report else 0

    def _add(self, loads: list[dict[PeerId, int]], peer: PeerId, amount: int) -> None:
        if peer:
            for load in loads:
                load[peer] = max(0, load.get(peer, 0) + amount)
            if peer in self._members:
                self._weigh(peer)
