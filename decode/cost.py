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

    def local_is_sooner(self, num_tokens: int, local_ahead: int, remote_ahead: int, num_running: int) -> bool:
        """Whether to compute ``num_tokens`` here.

        Args:
            num_tokens: what is left of the prompt.
            local_ahead: prompt tokens that are being computed here.
            remote_ahead: prompt tokens that we wait for from prefill workers.
            num_running: sequences that would wait for a local step.
        """
        if self._mode != "auto":
            return self._mode == "always"
        if num_tokens > self._max_local_tokens:
            return False
        local_s = (local_ahead + num_tokens * (1 + num_running)) * self.local_s_per_token
        remote_s = self.handoff_s + (remote_ahead + num_tokens) * self.remote_s_per_token
        return local_s < remote_s

    def s_per_token(self, *, has_peer: bool) -> float:
        """What a prompt's token takes where it would be computed."""
        if not has_peer or self._mode == "always":
            return self.local_s_per_token
        return (
            self.remote_s_per_token if self._mode == "never" else min(self.local_s_per_token, self.remote_s_per_token)
        )

    def computed_locally(self, num_tokens: int, seconds: float) -> None:
        """A local step computed ``num_tokens`` of prompts, and took so long."""
        self.local_s_per_token += _NEW_WEIGHT * (seconds / num_tokens - self.local_s_per_token)

    def handed_off(self, extra_s: float, s_per_token: float) -> None:
        """A handoff took ``extra_s`` beyond the prefill worker's queue and work, which went at ``s_per_token``."""
        self.remote_s_per_token += _NEW_WEIGHT * (s_per_token - self.remote_s_per_token)
        self.handoff_s += _NEW_WEIGHT * (max(extra_s, 0.0) - self.handoff_s)
