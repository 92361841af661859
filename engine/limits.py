"""What a request must satisfy before the engine sees it. The gateway checks too; workers trust nobody."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.errors import RequestError


def check_tokens(tokens: Sequence[int], vocab_size: int, max_model_len: int, max_cached_tokens: int) -> None:
    """Refuse token ids that the model lacks, and prompts that can never fit.

    Raises:
        RequestError: says which.
    """
    if not tokens:
        raise RequestError("the prompt is empty")
    worst = max(tokens)
    if worst >= vocab_size or min(tokens) < 0:
        raise RequestError(
            f"token id {worst if worst >= vocab_size else min(tokens)} is not within 0 … {vocab_size - 1}"
        )
    limit = min(max_model_len, max_cached_tokens)
    if len(tokens) >= limit:
        raise RequestError(f"the prompt has {len(tokens)} tokens, and the context {limit}, output included")
