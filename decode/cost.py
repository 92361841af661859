"""Where the rest of a prompt is computed sooner: here, or by a prefill worker. All figures are measured."""

from __future__ import annotations

_NEW_WEIGHT = 0.2


class CostModel:
    """Running estimates of local speed and of what a handoff costs. Pure bookkeeping.

    Args:
        mode: "auto", "never" or "always" compute locally.
        max_local_tokens: never more than this locally, in "auto".
    """

    def __init__(self, mode: str, max_local_tokens: int) -> None:
        self._mode = mode
        self._max_local_tokens = max_local_tokens
        # Before anything is measured: a small model on a CPU.
        self.local_s_per_token = 50e-6
        self.remote_s_per_token = 50e-6
        self.handoff_s = 4e-3
        """What a handoff adds to the time that the prompt took to compute."""

    def local_is_sooner(self, num_tokens: int, num_running: int) -> bool:
        """Whether to compute ``num_tokens`` here, where ``num_running`` sequences would wait for it."""
        if self._mode != "auto":
            return self._mode == "always"
        if num_tokens > self._max_local_tokens:
            return False
        local_s = num_tokens * self.local_s_per_token
        remote_s = self.handoff_s + num_tokens * self.remote_s_per_token
        return local_s * (1 + num_running) < remote_s

    def computed_locally(self, num_tokens: int, seconds: float) -> None:
        """A local step computed ``num_tokens`` of prompts, and took so long."""
        self.local_s_per_token += _NEW_WEIGHT * (seconds / num_tokens - self.local_s_per_token)

    def handed_off(self, num_tokens: int, total_s: float, queue_s: float, prefill_s: float) -> None:
        """A handoff of ``num_tokens`` took ``total_s`` in all, of which the prefill worker's queue and work."""
        self.remote_s_per_token += _NEW_WEIGHT * (prefill_s / num_tokens - self.remote_s_per_token)
        self.handoff_s += _NEW_WEIGHT * (max(total_s - queue_s - prefill_s, 0.0) - self.handoff_s)
