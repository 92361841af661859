"""The OpenAI API with the official client, on real workers."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator

import httpx
import openai
import pytest
import torch
import transformers
from support.served import Served, wait_for
from tandem.core.checkpoint import model_folder
from tandem.core.config import load_config

pytestmark = pytest.mark.e2e

PROMPT = "import os\n\ndef walk("
MODEL = "tandem-demo"


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def reference() -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(model_folder(load_config()), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    return transformers.AutoTokenizer.from_pretrained(model_folder(load_config()))


def test_models(client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert model.id == MODEL
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.models.retrieve("gpt-9")


def test_greedy_is_transformers(
    client: openai.OpenAI, reference: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerFast
) -> None:
    """Disaggregated output equals what transformers says, text and tokens."""
    for prompt in (PROMPT, "class Stack:\n    def push(self, item):\n" * 20, "x"):
        answer = client.completions.create(
            model=MODEL,
            prompt=prompt,
            max_tokens=48,
            temperature=0,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )
        ids = torch.tensor([tokenizer.encode(prompt)])
        with torch.inference_mode():
            want = reference.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=48, min_new_tokens=48, do_sample=False
            )[0, ids.shape[1] :]
        choice = answer.choices[0]
        assert choice.model_extra is not None
        assert choice.model_extra["token_ids"] == want.tolist()
        assert choice.text == tokenizer.decode(want, skip_special_tokens=True)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == ids.shape[1]
        assert answer.usage.completion_tokens == 48


def test_it_ran_on_separate_workers(served: Served, client: openai.OpenAI) -> None:
    moved = served.metric("tandem_transfer_bytes_total")
    prompt = [17 + i for i in range(1500)]
    answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=4)
    stages = served.stages(answer.id)
    for stage in ("gateway.received", "decode.handoff", "prefill.started", "transfer.started", "prefill.done",
                  "transfer.done", "decode.started", "gateway.first_token", "gateway.done"):  # fmt: skip
        assert stage in stages, stages
    assert served.metric("tandem_transfer_bytes_total", transport="shm") > moved
    assert answer.id in served.logs()


def test_streaming_equals_whole(client: openai.OpenAI) -> None:
    options = {"model": MODEL, "prompt": PROMPT, "max_tokens": 40, "temperature": 0.8, "seed": 5}
    whole = client.completions.create(**options)  # type: ignore[call-overload]
    text, usage, finishes = "", None, []
    for chunk in client.completions.create(**options, stream=True, stream_options={"include_usage": True}):  # type: ignore[call-overload]
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.text
            finishes.append(choice.finish_reason)
    assert text == whole.choices[0].text
    assert usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert finishes[-1] == whole.choices[0].finish_reason
    assert set(finishes[:-1]) == {None}


def test_prompts_of_every_kind(client: openai.OpenAI, tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    texts = [PROMPT, "for i in range("]
    ids = [tokenizer.encode(text) for text in texts]
    options = {"model": MODEL, "max_tokens": 12, "temperature": 0}
    singles = [client.completions.create(prompt=text, **options).choices[0].text for text in texts]  # type: ignore[call-overload]
    for prompt in (texts, ids):
        answer = client.completions.create(prompt=prompt, **options)  # type: ignore[call-overload]
        assert [choice.text for choice in answer.choices] == singles
        assert [choice.index for choice in answer.choices] == [0, 1]
    assert client.completions.create(prompt=ids[0], **options).choices[0].text == singles[0]  # type: ignore[call-overload]


def test_several_choices_and_seeds(client: openai.OpenAI) -> None:
    options = {"model": MODEL, "prompt": [PROMPT, "x = "], "max_tokens": 16, "temperature": 1.0, "n": 3, "seed": 11}
    first, again = (client.completions.create(**options) for _ in range(2))  # type: ignore[call-overload]
    texts = [choice.text for choice in first.choices]
    assert len(texts) == 6
    assert len(set(texts)) > 3
    assert [choice.text for choice in again.choices] == texts
    streamed = [""] * 6
    for chunk in client.completions.create(**options, stream=True):  # type: ignore[call-overload]
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == texts


def test_stop_strings(client: openai.OpenAI) -> None:
    options = {"model": MODEL, "prompt": PROMPT, "max_tokens": 60, "temperature": 0}
    whole = client.completions.create(**options).choices[0].text  # type: ignore[call-overload]
    for stop in (whole[10:13], whole[20:31], "\n"):
        for stream in (False, True):
            answer = client.completions.create(**options, stop=[stop, "never seen"], stream=stream)  # type: ignore[call-overload]
            choices = [c for chunk in answer for c in chunk.choices] if stream else answer.choices
            assert "".join(choice.text for choice in choices) == whole[: whole.index(stop)]
            assert choices[-1].finish_reason == "stop"


def test_stop_tokens(client: openai.OpenAI, tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    options = {"model": MODEL, "prompt": PROMPT, "max_tokens": 30, "temperature": 0}
    extra = {"return_token_ids": True, "ignore_eos": True}
    tokens = client.completions.create(**options, extra_body=extra).choices[0].model_extra["token_ids"]  # type: ignore[call-overload]
    stop = tokens[7]
    answer = client.completions.create(**options, extra_body=extra | {"stop_token_ids": [stop]}).choices[0]  # type: ignore[call-overload]
    assert answer.model_extra["token_ids"] == tokens[: tokens.index(stop) + 1]
    assert answer.finish_reason == "stop"


def test_echo_and_logprobs(
    client: openai.OpenAI, reference: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerFast
) -> None:
    answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=5, temperature=0, echo=True, logprobs=3)
    choice = answer.choices[0]
    assert choice.text.startswith(PROMPT)
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    prompt = tokenizer.encode(PROMPT)
    assert len(logprobs.token_logprobs) == len(prompt) + 5
    assert logprobs.token_logprobs[0] is None
    tokens = prompt + tokenizer.encode(choice.text[len(PROMPT) :])[:1]
    with torch.inference_mode():
        want = reference(torch.tensor([tokens])).logits[0].log_softmax(-1)
    for position in range(1, len(prompt)):
        value = logprobs.token_logprobs[position]
        assert value is not None
        assert abs(value - want[position - 1, tokens[position]].item()) < 1e-3
    assert logprobs.text_offset is not None
    assert logprobs.tokens is not None
    for offset, token in zip(logprobs.text_offset, logprobs.tokens, strict=True):
        assert choice.text[offset : offset + len(token)] == token
    nothing = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=0, echo=True, logprobs=1)
    assert nothing.choices[0].text == PROMPT
    assert nothing.usage is not None
    assert nothing.usage.completion_tokens == 0
    streamed = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=5, temperature=0, echo=True, logprobs=3, stream=True
    )
    assert "".join(c.text for chunk in streamed for c in chunk.choices) == choice.text


def test_chat(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "Write a function that adds two numbers."}]
    options = {"model": MODEL, "messages": messages, "max_tokens": 40, "temperature": 0}
    answer = client.chat.completions.create(**options, logprobs=True, top_logprobs=2)  # type: ignore[call-overload]
    message = answer.choices[0].message
    assert message.role == "assistant"
    assert message.content
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    assert all(len(entry.top_logprobs) == 2 for entry in content)
    assert all(entry.top_logprobs[0].logprob >= entry.logprob for entry in content)
    text = ""
    for chunk in client.chat.completions.create(**options, stream=True):  # type: ignore[call-overload]
        text += chunk.choices[0].delta.content or ""
    assert text == message.content


def test_chat_takes_what_fits(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": [{"type": "text", "text": "def f(x):"}]}],
        temperature=0,
        max_completion_tokens=3,
        extra_body={"ignore_eos": True},
    )
    assert answer.choices[0].finish_reason == "length"


def test_sampling_parameters_do_something(
    client: openai.OpenAI, tokenizer: transformers.PreTrainedTokenizerFast
) -> None:
    def text(**changes: object) -> str:
        options = {"model": MODEL, "prompt": PROMPT, "max_tokens": 24, "temperature": 1.5, "seed": 3, "extra_body": {}}
        return str(client.completions.create(**(options | changes)).choices[0].text)  # type: ignore[call-overload]

    greedy = text(temperature=0)
    assert text() == text()
    assert text() != text(seed=4)
    for narrow in ({"top_p": 1e-6}, {"extra_body": {"top_k": 1}}, {"extra_body": {"min_p": 1.0}}):
        assert text(**narrow) == greedy, narrow
    token = tokenizer.encode("lambda")[0]
    assert text(logit_bias={str(token): 100.0}).count(tokenizer.decode([token])) >= 20
    banned = tokenizer.encode(greedy)[0]
    assert not text(temperature=0, logit_bias={str(banned): -100.0}).startswith(tokenizer.decode([banned]))
    for penalty in ({"presence_penalty": 2.0}, {"frequency_penalty": 2.0}, {"extra_body": {"repetition_penalty": 5.0}}):
        assert text(temperature=0, max_tokens=100, **penalty) != text(temperature=0, max_tokens=100), penalty


def test_tokenize_and_back(served: Served, tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    text = "def naïve(x):\n\treturn '☃🎉'\n"
    answer = served.client.post("/tokenize", json={"prompt": text}).json()
    assert answer["tokens"] == tokenizer.encode(text)
    assert answer["count"] == len(answer["tokens"])
    assert served.client.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": text}
    chat = served.client.post("/tokenize", json={"messages": [{"role": "user", "content": "hi"}]}).json()
    want = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat["tokens"] == tokenizer.encode(want, add_special_tokens=False)


def test_characters_that_span_tokens_stream_whole(served: Served) -> None:
    tokens = served.client.post("/tokenize", json={"prompt": "☃🎉日本語" * 3}).json()["tokens"]
    # Force the output to be that text, token by token.
    pieces = []
    prompt = [1, 2, 3]
    for token in tokens:
        answer = served.complete(
            prompt=prompt, max_tokens=1, temperature=0, logit_bias={str(token): 100}, return_token_ids=True
        )
        pieces.append(answer["choices"][0]["token_ids"][0])
        prompt.append(token)
    assert pieces == tokens
    body = {"prompt": tokens[:-1], "max_tokens": 8, "stream": True, "temperature": 2.0, "seed": 1}
    with served.client.stream("POST", "/v1/completions", json=body) as stream:
        events = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: {")]
    whole = served.complete(**{k: v for k, v in body.items() if k != "stream"})
    assert "".join(event["choices"][0]["text"] for event in events) == whole["choices"][0]["text"]


def test_health_and_metrics(served: Served) -> None:
    assert served.client.get("/livez").json() == {"status": "ok"}
    assert served.client.get("/readyz").status_code == 200
    text = served.client.get("/metrics").text
    for name in ("tandem_ttft_seconds_bucket", "tandem_itl_seconds_bucket", 'tandem_stage_seconds_count{stage="prefill"',
                 "tandem_kv_blocks", "tandem_leases", "tandem_transfer_bytes_total", "tandem_handoffs_total"):  # fmt: skip
        assert name in text, name
    for worker in ("prefill-0", "decode-0", "gateway-0"):
        assert f'worker="{worker}"' in text


def test_a_client_that_leaves_cancels_on_both_workers_at_once(served: Served) -> None:
    async def leave_after(seconds: float, stream: bool) -> None:
        async with httpx.AsyncClient(base_url=served.url, trust_env=False) as client:
            body = {"prompt": list(range(100, 3000)), "max_tokens": 1000, "ignore_eos": True, "stream": stream}
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(client.post("/v1/completions", json=body, timeout=60), seconds)

    for seconds in (0.02, 0.1, 0.3, 0.8):
        for stream in (False, True):
            asyncio.run(leave_after(seconds, stream))
            wait_for(lambda: served.metric("tandem_requests_in_flight") == 0, 2, "the gateway to forget the request")
            served.wait_idle(timeout_s=4)


def test_a_slow_reader_gets_everything(served: Served) -> None:
    request = {"prompt": PROMPT, "max_tokens": 200, "temperature": 0, "ignore_eos": True}
    text, usage = "", None
    with served.client.stream(
        "POST", "/v1/completions", json=request | {"stream": True, "stream_options": {"include_usage": True}}
    ) as stream:
        events = (line for line in stream.iter_lines() if line.startswith("data: {"))
        for number, line in enumerate(events):
            event = json.loads(line.removeprefix("data: "))
            text += "".join(choice["text"] for choice in event["choices"])
            usage = event.get("usage") or usage
            if number in (2, 50):
                time.sleep(0.5)
    # Tokens that wait for the reader come in one event.
    assert usage["completion_tokens"] == 200
    assert text == served.complete(**request)["choices"][0]["text"]


def test_many_at_once(served: Served) -> None:
    """More requests than decode runs at a time; each says what it says alone."""

    async def all_of_them() -> list[str]:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(base_url=served.url, timeout=120, limits=limits, trust_env=False) as client:
            bodies = [
                {"prompt": f"def function_{i}(a, b):\n", "max_tokens": 12, "temperature": 1.0, "seed": i}
                for i in range(150)
            ]
            answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))
            return [answer.json()["choices"][0]["text"] for answer in answers]

    together = asyncio.run(all_of_them())
    for i in (0, 70, 149):
        alone = served.complete(prompt=f"def function_{i}(a, b):\n", max_tokens=12, temperature=1.0, seed=i)
        assert alone["choices"][0]["text"] == together[i]
    served.wait_idle()
