"""What a request says when nothing happens, and what is as good.

Logits depend in their last bits on how a prompt was cut into steps, which a disturbance changes. Where two tokens are
as likely as each other, to a few of these bits, either may be drawn, and everything after it is another text. About one
token in a million is such a tie.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from tandem.core.checkpoint import model_folder
from tandem.core.config import Config
from tandem.core.randomness import child_seed
from tandem.kernels import sampling
from tandem.kernels.sampling import SamplingRows

_LAST_BITS = 1e-4
"""Of float32 logits of the demo model; pieces of 16, 64 and 256 tokens change them by 1.2e-5 at most."""
_KNOWN = {
    "prompt", "max_tokens", "temperature", "seed", "n", "ignore_eos", "return_token_ids", "stream", "cache_salt",
}  # fmt: skip
"""What a request may ask for to be looked at more closely."""


class Undisturbed(dict[int, list[int]]):
    """Tokens of each choice.

    Args:
        tokens: what was said.
        request: to which.
        ask: what says the same of another request.
    """

    def __init__(
        self,
        tokens: dict[int, list[int]],
        request: dict[str, Any],
        ask: Callable[[dict[str, Any]], Undisturbed],
    ) -> None:
        super().__init__(tokens)
        self._request = request
        self._ask = ask

    def allows(self, choice: int, tokens: list[int], *, whole: bool = True) -> bool:
        """Whether a choice could have said this as well; not ``whole``: and more."""
        want = self[choice] if whole else self[choice][: len(tokens)]
        if tokens == want:
            return True
        if len(tokens) != len(want) or not self._request.keys() <= _KNOWN:
            return False
        at = next(index for index, pair in enumerate(zip(tokens, want, strict=True)) if pair[0] != pair[1])
        prompt = self._request["prompt"] + tokens[:at]
        seed = child_seed(self._request["seed"], choice)
        temperature = self._request["temperature"]
        tied = [_draw(prompt, seed, temperature, liked) == liked for liked in (tokens[at], want[at])]
        print(
            f"choice {choice} says {tokens[at]}, not {want[at]}, after {len(prompt)} tokens: a tie? {tied}", flush=True
        )
        if not all(tied):
            return False
        left = self._request["max_tokens"] - at - 1
        if not left:
            return True
        rest = {"prompt": [*prompt, tokens[at]], "seed": seed, "max_tokens": left, "n": 1}
        return self._ask(self._request | rest).allows(0, tokens[at + 1 :], whole=whole)


@functools.cache
def _model() -> Any:
    from transformers import AutoModelForCausalLM  # takes a second, and is nearly never needed

    return AutoModelForCausalLM.from_pretrained(model_folder(Config()), dtype=torch.float32).eval()


def _draw(prompt: list[int], seed: int, temperature: float, liked: int) -> int:
    """What comes after a prompt, by another implementation, if one token were more likely by a few bits."""
    with torch.inference_mode():
        logits = _model()(torch.tensor([prompt])).logits[:, -1].float()
        logits[0, liked] += _LAST_BITS
    rows = SamplingRows(
        temperature=torch.tensor([temperature]), top_k=torch.tensor([0]), top_p=torch.tensor([1.0]),
        min_p=torch.tensor([0.0]), seed=torch.tensor([seed]), position=torch.tensor([len(prompt)]),
    )  # fmt: skip
    return int(sampling.reference(logits, rows))
