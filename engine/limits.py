"""What a request must satisfy before the engine sees it. The gateway checks, and so do workers: they trust nobody."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.errors import RequestError


def check_prompt(tokens: Sequence[int], vocab_size: int, context_tokens: int, param: str = "prompt") -> None:
    """Refuse token ids that the model lacks, and prompts that leave no room for an output token.

    Raises:
        RequestError: says which; ``param`` names the field.
    """
    if not tokens:
        raise RequestError("the prompt is empty", param=param)
    check_ids(tokens, vocab_size, param)
    if len(tokens) >= context_tokens:
        raise RequestError(
            f"the prompt has {len(tokens)} tokens, and the context {context_tokens}, output included", param=param
        )


def check_ids(tokens: Sequence[int], vocab_size: int, param: str) -> None:
    """Refuse token ids that the model lacks.

    Raises:
        RequestError: names the first of the worst.
    """
    for worst in (max(tokens, default=0), min(tokens, default=0)):
        if not 0 <= worst < vocab_size:
            raise RequestError(f"token id {worst} is not within 0 … {vocab_size - 1}", param=param)
