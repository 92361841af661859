"""What clients are told of tokens: text, stop strings, events; and how long tokens took."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from tandem.cluster.gateway.choice import Choice, Piece
from tandem.cluster.gateway.responses import Responses
from tandem.cluster.gateway.tokenizer import Tokenizer
from tandem.core.checkpoint import model_folder
from tandem.core.config import load_config
from tandem.core.errors import RequestError
from tandem.core.messages import ChildUpdate, FinishReason
from tandem.core.tally import Tally
from tokenizers.decoders import DecodeStream


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(model_folder(load_config()))


@pytest.fixture(scope="module")
def plain() -> transformers.PreTrainedTokenizerFast:
    return transformers.AutoTokenizer.from_pretrained(model_folder(load_config()))


def said(choice: Choice, tokens: Sequence[int], rng: random.Random) -> str:
    """Push tokens in pieces of random size, as steps would, until the choice ends."""
    text = ""
    at = 0
    while at < len(tokens) and choice.finish is None:
        size = rng.randrange(1, 4)
        last = at + size >= len(tokens)
        text += choice.push(
            ChildUpdate(1, 0, list(tokens[at : at + size]), None, FinishReason.LENGTH if last else None)
        ).text
        at += size
    return text


@given(st.text(min_size=1, max_size=40), st.text(max_size=20), st.randoms())
def test_pieces_make_the_whole(text: str, prompt: str, rng: random.Random) -> None:
    tokenizer = Tokenizer.__new__(Tokenizer)
    tokenizer.__dict__ = _shared().__dict__
    fast = tokenizer._fast
    tokens, before = fast.encode(text).ids, fast.encode(prompt).ids
    assert said(Choice(tokenizer, before, []), tokens, rng) == fast.decode(tokens)


_cache: list[Tokenizer] = []


def _shared() -> Tokenizer:
    if not _cache:
        _cache.append(Tokenizer(model_folder(load_config())))
    return _cache[0]


@given(
    st.text("ab\n", min_size=1, max_size=30),
    st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
    st.randoms(),
)
def test_text_ends_before_the_first_stop_string(text: str, stops: list[str], rng: random.Random) -> None:
    tokenizer = _shared()
    tokens = tokenizer._fast.encode(text).ids
    choice = Choice(tokenizer, [5, 6], stops)
    got = said(choice, tokens, rng)
    ends = [position for stop in stops if (position := text.find(stop)) >= 0]
    # Tokens come in pieces: of two stop strings in one piece the earlier wins, as in the whole text.
    assert got == (text[: min(ends)] if ends else text)
    assert choice.finish == (FinishReason.STOP if ends else FinishReason.LENGTH)


def test_a_prompt_may_end_within_a_character(tokenizer: Tokenizer) -> None:
    fast = tokenizer._fast
    tokens = fast.encode("a☃é🎉b\n" * 3).ids
    for at in range(1, len(tokens)):
        choice = Choice(tokenizer, tokens[:at], [])
        text = said(choice, tokens[at:], random.Random(at))
        plain = DecodeStream(ids=tokens[max(0, at - 8) : at], skip_special_tokens=True)
        assert text == "".join(plain.step(fast, token) or "" for token in tokens[at:]), at


def test_special_tokens_are_not_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.eos_id is not None
    choice = Choice(tokenizer, [5], [])
    assert (
        choice.push(
            ChildUpdate(1, 0, [*tokenizer._fast.encode("x = 1").ids, tokenizer.eos_id], None, FinishReason.STOP)
        ).text
        == "x = 1"
    )


def test_without_a_tokenizer_there_are_only_tokens() -> None:
    piece = Choice(None, [1], []).push(ChildUpdate(1, 0, [5, 6], None, FinishReason.LENGTH))
    assert (piece.text, piece.tokens) == ("", [5, 6])


def test_bytes_of_tokens(tokenizer: Tokenizer) -> None:
    text = "é☃🎉 naïve\n\tx"
    tokens = tokenizer._fast.encode(text).ids
    assert b"".join(tokenizer.token_bytes(token) for token in tokens).decode() == text


def test_long_texts_are_told_by_their_length(tokenizer: Tokenizer) -> None:
    assert tokenizer.too_long("x" * 10**6, 1000)
    assert not tokenizer.too_long("x" * 100, 1000)


def test_a_template_that_raises_is_the_clients_fault(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError):
        asyncio.run(tokenizer.encode_chat([{"content": "no role"}], add_generation_prompt=True))  # type: ignore[list-item]


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("with_usage", [False, True])
@given(text=st.text())
def test_a_text_alone_is_the_same_event(chat: bool, with_usage: bool, text: str) -> None:
    responses = Responses('cmpl-""', 'a "model"', None, chat=chat, token_ids=False, with_usage=with_usage)
    piece = Piece(text, [1], [], 7, None)
    for index in (0, 3, 0):
        part = responses.part(index, piece, None, first=False)
        assert responses.text_chunk(index, text) == responses.chunk([part], None)


def test_a_tally_is_a_histogram() -> None:
    tallied, plain = CollectorRegistry(), CollectorRegistry()
    tally = Tally("tandem_x_seconds", "Of a test", (0.001, 0.5, 2), tallied)
    histogram = Histogram("tandem_x_seconds", "Of a test", buckets=(0.001, 0.5, 2), registry=plain)
    for value in (0, 0.001, 0.0011, 0.5, 1.5, 2, 7):
        tally.observe(value)
        histogram.observe(value)
    lines = [line for line in generate_latest(plain).splitlines() if b"_created" not in line]
    assert generate_latest(tallied).splitlines() == lines
