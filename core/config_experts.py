"""The YAML's experts section."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from .config_section import Section

_INTERVAL_STEPS = 3000


class BalanceConfig(Section):
    enabled: bool | None = None
    """Whether experts move between the workers of a group while they serve. Default: where redundant is above 0,
    and the workers can read each other's memory."""
    when: Literal["gain", "interval", "manual"] = "gain"
    """gain: at the end of an interval, if it is predicted to save more than it costs, and min_gain. interval: whenever
    one is over. manual: only by `tandem rebalance`."""
    policy: Literal["auto", "global", "hierarchical", "incremental"] = "auto"
    """auto and incremental: the fewest moves that make ranks as even as a placement from nothing would, within 1 %.
    global, hierarchical: a placement from nothing."""
    interval_steps: int | None = Field(default=None, ge=1, le=1 << 40)
    """Steps of the group between two looks; the first comes after a quarter. Default: 3000."""
    interval_s: float | None = Field(default=None, gt=0, le=1e9)
    """Seconds between two looks, in place of interval_steps."""
    min_gain: float = Field(default=0.02, ge=0, lt=1)
    """For gain: by what part the fullest ranks must become less full."""
    window_steps: int = Field(default=1000, ge=1, le=1 << 24)
    """The load is that of so many last steps."""
    load_file: str | None = None
    """A recorded load (`tandem trace experts`): experts are placed for it from the start."""
    timeout_s: float = Field(default=30.0, gt=0, le=3600)
    """Within which a worker has to stage a layer; else it stays as it was, and the next interval tries again."""
    exchange_steps: int = Field(default=4, ge=1, le=1024)
    """Steps between two words of the workers; a layer takes two of them."""
    checksums: bool = False
    """Compare experts that have moved with a checksum. On a GPU they are copied to the host for it."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.interval_steps is not None and self.interval_s is not None:
            raise ValueError("interval_s: interval_steps is given too: give one of the two")
        return self

    @property
    def steps(self) -> int:
        """``interval_steps``, or its default."""
        return self.interval_steps or _INTERVAL_STEPS


class ExpertsConfig(Section):
    parallel: int = Field(default=1, ge=1, le=1024)
    """Workers of a pool that share the experts of one model: each has some of them, and requests of its own. Divides
    every pool's replicas. Where a worker has several processes (tensor_parallel), experts are spread over all of them.
    One that dies takes the others of its group along; all start anew."""
    redundant: int = Field(default=0, ge=0, le=4096)
    """Experts of a layer that such a group holds a second time. The model's and these divide among its processes."""
    balance: BalanceConfig = BalanceConfig()
    """Which workers hold which experts, and when that changes."""

    @property
    def balanced(self) -> bool:
        """Whether groups are to move experts, if they can."""
        return self.redundant > 0 if self.balance.enabled is None else self.balance.enabled
