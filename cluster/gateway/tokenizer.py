"""Text to tokens and back, by the checkpoint's own tokenizer and chat template."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tokenizers.decoders import ByteLevel, DecodeStream

from ...core.errors import ConfigError, RequestError
from ...core.log import logger

_INLINE_CHARACTERS = 20_000
_PRIMING_TOKENS = 8
_PARTIAL = "\ufffd"
"""What bytes that are no character are shown as."""
_T = TypeVar("_T")


def _byte_characters() -> dict[str, int]:
    """The character that byte-level BPE vocabularies write for each byte (Radford et al. 2019): itself where it
    prints."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_characters()


class Tokenizer:
    """A checkpoint's tokenizer. Long texts are worked on in a thread, so that nobody else waits.

    Args:
        folder: the checkpoint's.

    Raises:
        ConfigError: there is none, or not one of the fast kind.
    """

    def __init__(self, folder: Path) -> None:
        if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            raise ConfigError(f"{folder}: no tokenizer", fix="add the checkpoint's tokenizer.json")
        from transformers import AutoTokenizer  # two seconds

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{folder}: the tokenizer cannot be read: {error}") from None
        self._fast: Any = getattr(self._tokenizer, "backend_tokenizer", None)
        if self._fast is None:
            raise ConfigError(f"{folder}: {type(self._tokenizer).__name__} is not a fast tokenizer")
        self.eos_id: int | None = self._tokenizer.eos_token_id
        self._longest_token = max(len(token.encode()) for token in self._fast.get_vocab())
        self._special = set(self._tokenizer.all_special_ids)
        self._texts = TokenTexts(self._fast) if isinstance(self._fast.decoder, ByteLevel) else None

    def too_long(self, text: str, max_tokens: int) -> bool:
        """Whether ``text`` cannot have fewer than ``max_tokens`` tokens, by its length alone."""
        return len(text) > max_tokens * self._longest_token

    async def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text, with the tokens that the model wants around it if ``special``."""
        return await _in_thread(lambda: list(self._fast.encode(text, add_special_tokens=special).ids), len(text))

    async def encode_chat(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool) -> list[int]:
        """Token ids of a conversation by the checkpoint's chat template.

        Raises:
            RequestError: no template, or the template refuses the messages.
        """
        if not self._tokenizer.chat_template:
            raise RequestError("this model has no chat template", fix="use /v1/completions", param="messages")

        def render() -> list[int]:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
            return list(self._fast.encode(text, add_special_tokens=False).ids)

        try:
            return await _in_thread(render, sum(len(str(message)) for message in messages))
        except Exception as error:  # noqa: BLE001 - a template can raise anything
            logger.info("chat template: %s", error)
            raise RequestError(f"the chat template refuses these messages: {error}", param="messages") from None

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        return str(self._fast.decode(list(ids), skip_special_tokens=True))

    def token_text(self, token: int) -> str:
        """What one token stands for; a part of a character is shown as U+FFFD."""
        return str(self._fast.decode([token], skip_special_tokens=False))

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one token stands for, which need not be whole characters."""
        piece = self._fast.id_to_token(token) or ""
        if all(character in _BYTE_OF for character in piece) and token not in self._special:
            return bytes(_BYTE_OF[character] for character in piece)
        return self.token_text(token).encode()

    def stream(self, prompt: Sequence[int]) -> TextStream:
        """A decoder of one output that continues ``prompt``."""
        return TextStream(self._fast, prompt, self._texts)


class TokenTexts(dict[int, str]):
    """Tokens' texts, "" for special ones; filled when they are asked for.

    A token of byte-level BPE stands for the same bytes wherever it is. So it adds this text to an output that ends with
    a whole character, if the text has no U+FFFD: then the bytes are whole characters, too.
    """

    def __init__(self, fast: Any) -> None:
        super().__init__()
        self._fast = fast

    def __missing__(self, token: int) -> str:
        text = self[token] = str(self._fast.decode([token], skip_special_tokens=True))
        return text


class TextStream:
    """Decodes an output token by token; holds back what is not yet whole characters.

    Args:
        fast: the tokenizer.
        prompt: what the output continues.
        texts: of tokens, if a token's does not depend on those before.
    """

    def __init__(self, fast: Any, prompt: Sequence[int], texts: TokenTexts | None) -> None:
        self._fast = fast
        self._texts = texts
        # The text of a token can depend on what comes before it: start from the end of the prompt.
        self._prompt_end = list(prompt[-_PRIMING_TOKENS:])
        self._stream: DecodeStream | None = DecodeStream(ids=self._prompt_end, skip_special_tokens=True)
        """None: all tokens so far are whole characters, and what comes has a text of its own."""
        if texts is not None and not self._decode(self._prompt_end).endswith(_PARTIAL):
            self._stream = None
        self._ids: list[int] = []
        self._length = 0

    def push(self, tokens: Sequence[int]) -> str:
        """The text that these tokens complete."""
        self._ids.extend(tokens)
        text = ""
        if self._stream is None and self._texts is not None:
            text = "".join(map(self._texts.__getitem__, tokens))
        if self._stream is not None or _PARTIAL in text:
            text = "".join(map(self._step, tokens))
        self._length += len(text)
        return text

    def _step(self, token: int) -> str:
        if self._stream is None:
            self._stream = DecodeStream(skip_special_tokens=True)
        text = self._stream.step(self._fast, token) or ""
        if text and self._texts is not None:
            self._stream = None
        return text

    def finish(self) -> str:
        """What was held back."""
        if self._stream is None:
            return ""
        before, whole = self._decode(self._prompt_end), self._decode([*self._prompt_end, *self._ids])
        return whole[len(before) + self._length :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._fast.decode(ids, skip_special_tokens=True))


async def _in_thread(work: Callable[[], _T], size: int) -> _T:
    return await asyncio.to_thread(work) if size > _INLINE_CHARACTERS else work()
