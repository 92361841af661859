"""When experts move: a state machine without I/O.

::

    WATCHING ──step: interval over──▶ PLANNING ──decide: go──▶ MOVING ──ended──▶ WATCHING
                                          └──────decide: not, or give_up──────────▶

One rank asks it, and tells all what it answered: seconds differ between ranks, and none may go its own way.
"""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ..core.clock import Clock
from ..core.errors import IllegalTransition, PlacementError
from .balance import balancedness, num_moved, rank_loads
from .packing import Floats
from .placement import Placement, Topology

_HISTORY = 32


class TriggerState(enum.Enum):
    """See the module."""

    WATCHING = "watching"
    PLANNING = "planning"
    MOVING = "moving"


@dataclass(frozen=True)
class TriggerSettings:
    """When to move.

    Raises:
        PlacementError: a number is out of range.
    """

    expert_bytes: int
    """All tensors of one expert of one layer."""
    bytes_per_s: float
    """How fast a rank receives experts."""
    mode: Literal["interval", "gain", "manual"] = "gain"
    """"interval" moves whenever the interval is over and anything would move; "gain" if it saves more than it costs;
    "manual" only when somebody demands it."""
    interval_steps: int = 3000
    """Steps between two looks at the load, and those that a placement is expected to last."""
    interval_s: float | None = None
    """Seconds, in place of ``interval_steps`` and, a quarter of it, ``first_steps``."""
    first_steps: int = 750
    """Steps before the first look."""
    min_ratio: float = 1.0
    """For "gain": how many times its cost a move must save."""
    min_gain: float = 0.0
    """For "gain": by what part the fullest ranks must become less full."""

    def __post_init__(self) -> None:
        for name in ("expert_bytes", "bytes_per_s", "interval_steps", "first_steps", "min_ratio"):
            if not getattr(self, name) > 0:
                raise PlacementError(f"trigger: {name} is {getattr(self, name)}, expected more than 0")
        if self.interval_s is not None and not self.interval_s > 0:
            raise PlacementError(f"trigger: interval_s is {self.interval_s}, expected more than 0")
        if not 0 <= self.min_gain < 1:
            raise PlacementError(f"trigger: min_gain is {self.min_gain}, expected at least 0 and less than 1")


class Decision(NamedTuple):
    """Whether to move, and from what that follows."""

    go: bool
    reason: str
    balancedness: float
    """Now."""
    predicted: float
    """Balancedness after the move, for the same load."""
    num_moved: int
    """Experts that travel, over all layers."""
    num_bytes: int
    saved_s: float
    """What ``interval_steps`` steps take less."""
    cost_s: float
    """What receiving takes, if nothing of it overlaps with the steps: of all ranks, that which receives the most."""


class Trigger:
    """Decides when. Not thread-safe; never blocks.

    Args:
        settings: when to move.
        topology: slots and ranks.
        clock: of the placement's age and the length of steps.
    """

    def __init__(self, settings: TriggerSettings, topology: Topology, clock: Clock) -> None:
        self._settings, self._topology, self._clock = settings, topology, clock
        self._state = TriggerState.WATCHING
        self._left = settings.first_steps
        self._placed_s = clock.monotonic_s()
        self._due_s = self._placed_s + (settings.interval_s or 0) / 4
        self._history: deque[str] = deque(maxlen=_HISTORY)
        self.outcomes: dict[str, int] = {"moved": 0, "declined": 0, "failed": 0}
        """How attempts ended."""
        self.last: Decision | None = None
        """The last decision."""

    @property
    def state(self) -> TriggerState:
        """What it is doing."""
        return self._state

    @property
    def age_s(self) -> float:
        """Seconds since the placement changed, or since the start."""
        return self._clock.monotonic_s() - self._placed_s

    def step(self, num_steps: int = 1) -> bool:
        """Count steps, dummy ones too. Says whether it is time to plan; then `decide` comes next."""
        self._left -= num_steps
        if self._state is not TriggerState.WATCHING or self._settings.mode == "manual":
            return False
        if self._left > 0 if self._settings.interval_s is None else self._clock.monotonic_s() < self._due_s:
            return False
        self._become(TriggerState.PLANNING, "interval over")
        return True

    def demand(self) -> bool:
        """Plan now, because somebody asks for it. Says whether that begins: not while experts move."""
        if self._state is not TriggerState.WATCHING:
            return False
        self._become(TriggerState.PLANNING, "demanded")
        return True

    def decide(
        self, load: Floats, current: Placement, new: Placement, experts_s_per_step: float, *, forced: bool = False
    ) -> Decision:
        """Whether ``new`` is worth moving to. If so, `ended` comes next; if not, the next interval has begun.

        Args:
            load: [layers, logical] tokens of the window.
            current: where experts are.
            new: where they could be.
            experts_s_per_step: seconds of a step in which ranks compute experts, or wait for the fullest to end.
            forced: move whatever it gains, because somebody asked.

        Raises:
            IllegalTransition: nobody was to plan.
            PlacementError: what is given does not fit together; the attempt counts as failed.
        """
        self._expect(TriggerState.PLANNING, "decide")
        try:
            decision = self._judge(load, current, new, experts_s_per_step, forced)
        except BaseException:
            self._begin_interval("failed", "decide: error")
            raise
        self.last = decision
        if decision.go:
            self._become(TriggerState.MOVING, decision.reason)
        else:
            self._begin_interval("declined", decision.reason)
        return decision

    def give_up(self, error: str) -> None:
        """No plan was made, because of ``error``: the attempt counts as failed, and the next interval has begun.

        Raises:
            IllegalTransition: nobody was to plan.
        """
        self._expect(TriggerState.PLANNING, "give_up")
        self._begin_interval("failed", f"give_up: {error}")

    def ended(self, *, error: str = "") -> None:
        """The move is over: all layers are where they should be, or some are not because of ``error``.

        Raises:
            IllegalTransition: nothing moved.
        """
        self._expect(TriggerState.MOVING, "ended")
        if not error:
            self._placed_s = self._clock.monotonic_s()
        self._begin_interval("failed" if error else "moved", f"ended: {error or 'moved'}")

    def _judge(
        self, load: Floats, current: Placement, new: Placement, experts_s_per_step: float, forced: bool
    ) -> Decision:
        settings = self._settings
        before = rank_loads(load, current, self._topology)
        after = rank_loads(load, new, self._topology)
        count, most = num_moved(current, new, self._topology)
        fullest = float(before.max(-1).sum())
        saved = 1 - float(after.max(-1).sum()) / fullest if fullest else 0.0
        lasting_s = settings.interval_s or experts_s_per_step * settings.interval_steps
        saved_s = saved * lasting_s
        cost_s = most * settings.expert_bytes / settings.bytes_per_s
        if not count:
            go, reason = False, "nothing would move"
        elif forced:
            go, reason = True, "demanded"
        elif settings.mode == "interval":
            go, reason = True, "the interval is over"
        else:
            go = saved_s > settings.min_ratio * cost_s
            sign = ">" if go else "≤"
            reason = f"saves {saved_s:.3g} s {sign} {settings.min_ratio:g} × {cost_s:.3g} s that moving costs"
            if saved < settings.min_gain:
                go, reason = False, f"the fullest ranks become {saved:.2%} less full, less than {settings.min_gain:.2%}"
        return Decision(
            go, reason, balancedness(before), balancedness(after), count, count * settings.expert_bytes, saved_s, cost_s
        )

    def _begin_interval(self, outcome: str, why: str) -> None:
        self.outcomes[outcome] += 1
        self._left = self._settings.interval_steps
        self._due_s = self._clock.monotonic_s() + (self._settings.interval_s or 0)
        self._become(TriggerState.WATCHING, why)

    def _expect(self, state: TriggerState, event: str) -> None:
        if self._state is not state:
            raise IllegalTransition(
                f"{event} while {self._state.value}, expected {state.value}", history=tuple(self._history)
            )

    def _become(self, state: TriggerState, why: str) -> None:
        self._history.append(f"{self._state.value} → {state.value}: {why}")
        self._state = state
