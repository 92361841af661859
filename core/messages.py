"""What travels between processes: MessagePack structs, typed and bounded. Nothing here is ever pickled.

::

    gateway ── Generate, Abort ─────────────────────────────────────► decode
    gateway ◄─ Update, Refused ────────────────────────────────────── decode
    decode  ── Hello, Prefill, Renew, Release, Farewell ────────────► prefill
    decode  ◄─ HelloReply, Accepted, BlocksReady, Prefilled, PrefillFailed ── prefill, or a decode worker that ends
    any     ── Report ──► gateways          gateway ── Scrape ──► worker ── Scraped ──► gateway
    gateway ── KVClear, KVPin, KVUnpin ──► worker ── KVControlled ──► gateway
    gateway ── KVWatch ──► worker ── KVSnapshot, then KVEvents ──► gateway

`decode` either returns a message that satisfies every bound below, or raises: no half-checked value gets further.
"""

from __future__ import annotations

import enum
from typing import Annotated, Final, TypeVar

import msgspec
from msgspec import Meta, Struct

from .bounds import (
    MAX_CHILDREN,
    MAX_LOGPROBS,
    MAX_RANKS,
    MAX_TOKENS,
    Count,
    FileName,
    Name,
    Priority,
    Seconds,
    Seed,
    Text,
    TokenId,
    TokenIds,
    TraceParent,
)
from .expert_messages import ExpertsReport
from .kv_messages import KVClear, KVControlled, KVEvents, KVPin, KVReport, KVSnapshot, KVUnpin, KVWatch

PROTOCOL_VERSION: Final = 2
"""Peers of one protocol version interoperate, whatever their package versions."""

MAX_MESSAGE_BYTES: Final = 64 << 20
"""Largest frame that a message socket accepts."""


class FinishReason(enum.StrEnum):
    """Why a sequence ended. `stop` covers end-of-sequence tokens, stop tokens and stop strings."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


class FailureReason(enum.StrEnum):
    """Why KV did not arrive; the label of a metric."""

    REFUSED = "refused"
    """The handshake found two ends that cannot exchange KV."""
    EXPIRED = "expired"
    """The lease ran out before the read was done."""
    GENERATION = "generation"
    """The block had been reused when its bytes landed."""
    CHECKSUM = "checksum"
    """What landed is not what the prefill worker computed."""
    TRANSPORT = "transport"
    """The bytes could not be moved."""
    PEER_LOST = "peer_lost"
    """The prefill worker went away."""
    TIMEOUT = "timeout"
    """The prefill made no progress for too long."""
    PREFILL = "prefill"
    """The prefill worker failed the request."""
    LEAVING = "leaving"
    """The prefill worker is about to end, and had not begun: another one is asked."""


class Sampling(Struct, array_like=True, frozen=True):
    """How the next token is chosen. The defaults choose greedily."""

    temperature: Annotated[float, Meta(ge=0, le=100)] = 0.0
    """0: the likeliest token."""
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Meta(ge=0, lt=1 << 31)] = 0
    """0: all tokens."""
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] = 1.0
    """Over prompt and output; 1: none (Keskar et al. 2019, arXiv:1909.05858)."""
    logit_bias: Annotated[dict[TokenId, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=1024)] = {}
    logprobs: Annotated[int, Meta(ge=-1, le=MAX_LOGPROBS)] = -1
    """Alternatives reported beside the chosen token's log probability; −1: none, not even its own."""

    @property
    def needs_history(self) -> bool:
        """Whether the tokens so far change the next token's distribution."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1


class Stopping(Struct, array_like=True, frozen=True):
    """When a sequence ends."""

    max_tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
    """Output tokens, those before a replay included."""
    stop_ids: Annotated[list[TokenId], Meta(max_length=256)] = []
    """Tokens that end the output and are its last token; empty when the client ignores them."""


class Child(Struct, array_like=True, frozen=True):
    """One of the n outputs of a request."""

    index: Annotated[int, Meta(ge=0, lt=MAX_CHILDREN)]
    seed: Seed


class Generate(Struct, tag=True, frozen=True):
    """Gateway → decode: produce tokens. After a worker's death the same request comes again, with its tokens so far."""

    ticket: Count
    """Names this attempt in every later message; unique in the life of the sending gateway."""
    request_id: Name
    tokens: Annotated[TokenIds, Meta(min_length=1)]
    """Prompt, and the output so far when the request is replayed."""
    num_prompt_tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
    children: Annotated[list[Child], Meta(min_length=1, max_length=MAX_CHILDREN)]
    sampling: Sampling
    stopping: Stopping
    prompt_logprobs: Annotated[int, Meta(ge=-1, le=MAX_LOGPROBS)] = -1
    """Alternatives to report for each prompt token; −1: no prompt log probabilities."""
    salt: Name = ""
    """Requests share cached KV only under equal salts."""
    prefill: Name = ""
    """The peer that computes the prompt; empty: the receiver does."""
    hidden_states: FileName = ""
    """The file for the prompt's hidden states."""
    trace: TraceParent = ""
    """The gateway's span."""
    priority: Priority = 0


class Abort(Struct, tag=True, frozen=True):
    """Gateway → decode: the client is gone, or a stop string was found."""

    tickets: Annotated[list[Count], Meta(max_length=1 << 16)]
    child: Annotated[int, Meta(ge=-1, lt=MAX_CHILDREN)] = -1
    """One child's index, or −1 for all."""


class TokenLogprobs(Struct, array_like=True, frozen=True):
    """Natural logarithms of the model's own probabilities, before temperature and filters."""

    chosen: float
    top_ids: list[TokenId] = []
    """Likeliest first."""
    top: list[float] = []


class ChildUpdate(Struct, array_like=True, frozen=True):
    """New tokens of one output."""

    ticket: Count
    index: Annotated[int, Meta(ge=0, lt=MAX_CHILDREN)]
    tokens: TokenIds
    logprobs: list[TokenLogprobs] | None = None
    finish: FinishReason | None = None


class Stage(Struct, array_like=True, frozen=True):
    """A mark on a request's timeline."""

    ticket: Count
    name: Name
    at_s: float
    """Wall clock of the worker."""
    detail: Text = ""


class PromptLogprobs(Struct, array_like=True, frozen=True):
    """Log probabilities of prompt tokens; the first token has none."""

    ticket: Count
    first: Count
    """Position of the first token that this part is about."""
    values: list[TokenLogprobs]


class Usage(Struct, array_like=True, frozen=True):
    """How long each stage of a request took, and what it reused."""

    ticket: Count
    queue_s: Seconds
    prefill_s: Seconds
    transfer_s: Seconds
    """Time that the first decode step waited for KV after the prompt was computed."""
    cached_tokens: Count
    transferred_bytes: Count


class Moved(Struct, array_like=True, frozen=True):
    """An output that the sender, which is about to end, does not go on with."""

    ticket: Count
    index: Annotated[int, Meta(ge=0, lt=MAX_CHILDREN)]
    readers: Annotated[list[Name], Meta(max_length=4096)] = []
    """Decode workers that can read its KV from the sender, which holds it; empty: it holds none."""


class Update(Struct, tag=True, frozen=True):
    """Decode → gateway: what a step produced for that gateway's requests."""

    children: list[ChildUpdate] = []
    stages: list[Stage] = []
    prompt_logprobs: list[PromptLogprobs] = []
    usages: list[Usage] = []
    moved: list[Moved] = []
    """Their tokens up to here are among `children`, or came before."""


class Refused(Struct, tag=True, frozen=True):
    """Decode → gateway: the request ends with an error."""

    ticket: Count
    status: Annotated[int, Meta(ge=400, le=599)]
    message: Text
    retryable: bool = False


class KVGroupSpec(Struct, array_like=True, frozen=True):
    """Layers that share blocks: see `kv_transfer.layout.KVGroup`."""

    layers: Annotated[list[Count], Meta(max_length=4096)]
    window: Count
    """Tokens that they see; 0: all."""


class CacheSpec(Struct, frozen=True):
    """How a worker's KV blocks lie in memory: see `kv_transfer.layout.KVLayout`."""

    num_kv_heads: Count
    """Of the whole model; a rank holds some of them."""
    head_dim: Count
    block_tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
    dtype: Name
    num_layers: Count
    """Places in a block."""
    groups: Annotated[list[KVGroupSpec], Meta(max_length=1024)]
    num_parts: Annotated[int, Meta(ge=1, le=2)] = 2
    """Keys and values, or 1: rows that serve as both."""


class RankSpec(Struct, frozen=True):
    """One rank of a worker: what it holds of each block, and how it can be read."""

    first_head: Count
    num_heads: Count
    transports: Annotated[dict[Name, Annotated[bytes, Meta(max_length=1 << 16)]], Meta(max_length=16)]
    """Name → opaque descriptor, of those that the rank can use."""
    memory: Name = "host"
    """Where its blocks are: "host" or "cuda"."""


class Hello(Struct, tag=True, frozen=True):
    """First message between a decode worker and one that it reads from; `HelloReply` mirrors it.

    The first three fields are the same in all versions of the protocol: whatever else a peer tells, it can be refused
    with a reason.
    """

    protocol: int
    peer: Name
    fingerprint: Name
    """Of the model's configuration and weights."""
    cache: CacheSpec = CacheSpec(0, 0, 1, "", 0, [])
    layer_groups: Annotated[list[Count], Meta(max_length=1024)] = []
    """First layer of each group of layers that is handed over as one."""
    ranks: Annotated[list[RankSpec], Meta(max_length=MAX_RANKS)] = []
    """The first one has the blocks' generations too."""
    lease_s: Seconds = 30.0
    no_sums: Text = ""
    """Why the peer cannot send checksums of its KV, or ""."""


class HelloReply(Struct, tag=True, frozen=True):
    """Prefill → decode: accepted, or why not."""

    hello: Hello
    refused: Text = ""
    """Empty when accepted; else the field and both values."""


class Prefill(Struct, tag=True, frozen=True):
    """Decode → prefill: compute this prompt, and let me read its blocks."""

    number: Count
    """With the sender's peer id: the transfer id."""
    request_id: Name
    tokens: Annotated[TokenIds, Meta(min_length=1)]
    num_prompt_tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
    skip_tokens: Count
    """The reader has the KV of this prefix."""
    children: Annotated[list[Child], Meta(min_length=1, max_length=MAX_CHILDREN)]
    sampling: Sampling
    prompt_logprobs: Annotated[int, Meta(ge=-1, le=MAX_LOGPROBS)] = -1
    salt: Name = ""
    hidden_states: FileName = ""
    """The file for the prompt's hidden states."""
    sum_tokens: Annotated[int, Meta(ge=0, le=1 << 40)] = 0
    """Send a checksum for each so many tokens of the prompt (see `kv_transfer.checksums`); 0: send none."""
    sum_dtype: Name = ""
    """Of the KV in this dtype, the reader's."""
    trace: TraceParent = ""
    """The reader's span."""
    priority: Priority = 0


class Table(Struct, array_like=True, frozen=True):
    """A sequence's blocks in one KV group, in the sender's block size."""

    first_token: Count
    """Of the first block: a multiple of the sender's `block_tokens`."""
    blocks: Annotated[list[Count], Meta(max_length=MAX_TOKENS)]
    generations: Annotated[list[Count], Meta(max_length=MAX_TOKENS)]


class Accepted(Struct, tag=True, frozen=True):
    """Prefill → decode: the blocks that will hold the prompt from `skip_tokens` on, under a lease from now."""

    number: Count
    tables: Annotated[list[Table], Meta(max_length=1024)]
    """One for each KV group; of a group with a window, only what the next token sees."""
    cached_tokens: Count


class BlocksReady(Struct, tag=True, frozen=True):
    """Prefill → decode, a watermark: this layer group's KV of the first `num_tokens` tokens may be read."""

    number: Count
    layer_group: Annotated[int, Meta(ge=0, lt=1024)]
    num_tokens: Count
    first_sum: Count = 0
    """Number of the first checksum: it is for tokens from ``first_sum * sum_tokens`` on."""
    sums: Annotated[bytes, Meta(max_length=8 * MAX_TOKENS)] = b""
    """Those that can be told since the last watermark: 64 bits each, little-endian."""


class SampledToken(Struct, array_like=True, frozen=True):
    """One sampled token of one child."""

    token: TokenId
    logprobs: TokenLogprobs | None = None


class Prefilled(Struct, tag=True, frozen=True):
    """Prefill → decode: the prompt is computed, and this is each child's first token."""

    number: Count
    samples: Annotated[list[SampledToken], Meta(min_length=1, max_length=MAX_CHILDREN)]
    queue_s: Seconds
    prefill_s: Seconds
    s_per_token: Seconds
    """Of the step that ended it, all its prompts together."""
    prompt_logprobs: list[TokenLogprobs] = []


class PrefillFailed(Struct, tag=True, frozen=True):
    """Prefill → decode: no KV will come, and the lease is gone."""

    number: Count
    reason: FailureReason
    message: Text
    status: Annotated[int, Meta(ge=400, le=599)] = 503


class Renew(Struct, tag=True, frozen=True):
    """Decode → prefill, every third of a lease: these transfers are still wanted."""

    numbers: Annotated[list[Count], Meta(max_length=1 << 16)]


class Release(Struct, tag=True, frozen=True):
    """Decode → prefill: these transfers are over (done, failed or aborted); nothing will be read any more."""

    numbers: Annotated[list[Count], Meta(max_length=1 << 16)]


class Farewell(Struct, tag=True, frozen=True):
    """Decode → prefill worker that is about to end: this reader asks it for nothing more."""


class Report(Struct, tag=True, frozen=True):
    """Worker → gateways, about once a second while anything changes: its load."""

    running: Count
    waiting: Count
    queued_tokens: Count
    free_blocks: Count
    num_blocks: Count
    leases: Count = 0
    transfers: Count = 0
    output_tokens: Count = 0
    """Tokens produced since the worker started."""
    prompt_tokens: Count = 0
    """Prompt tokens computed since the worker started."""
    received_bytes: Count = 0
    """KV bytes read from peers since the worker started."""
    peers: Annotated[list[Name], Meta(max_length=4096)] = []
    """Prefill peers whose handshake this decode worker has accepted."""
    refused: Annotated[dict[Name, Text], Meta(max_length=4096)] = {}
    """Prefill peers that it cannot read from, and why."""
    cached_tokens: Count = 0
    """Prompt tokens found in the prefix cache since the worker started."""
    kv: Annotated[list[KVReport], Meta(max_length=64)] = []
    """Of the prefix cache, and of each tier."""
    experts: ExpertsReport | None = None
    """Of the group that shares experts, from the worker that plans for it."""
    urgent: Annotated[list[tuple[Count, Count]], Meta(max_length=2)] = []
    """Of `waiting` and `queued_tokens`, what comes before a request of high priority, and before one of normal; empty:
    all of it does."""

    def before(self, level: int) -> tuple[int, int]:
        """Sequences and prompt tokens that come before a request of a level of `core.urgency`. Running ones do
        always."""
        waiting, tokens = self.urgent[level] if level < len(self.urgent) else (self.waiting, self.queued_tokens)
        return self.running + waiting, tokens


class Subscribe(Struct, tag=True, frozen=True):
    """Gateway → worker: send me your reports."""


class Scrape(Struct, tag=True, frozen=True):
    """Gateway → worker: your metrics, please."""

    number: Count


class Scraped(Struct, tag=True, frozen=True):
    """Worker → gateway: metrics in Prometheus' text format."""

    number: Count
    text: Annotated[str, Meta(max_length=4 << 20)]


class Member(Struct, array_like=True, frozen=True):
    """A live process of the cluster."""

    peer: Name
    role: Name
    """prefill, decode, colocated or gateway."""
    node: Name
    endpoint: Name
    """Where its message socket listens; empty for gateways, which only connect."""
    ready: bool = True
    hands_over: bool = False
    """It is about to end, and what runs on it may go on elsewhere, with its KV."""


class Membership(Struct, tag=True, frozen=True):
    """Controller → everyone, whenever it changes: who is there. Carried by Ray, as bytes."""

    version: Count
    members: Annotated[list[Member], Meta(max_length=1 << 16)]
    host_tiers: Annotated[list[Member], Meta(max_length=1 << 16)] = []
    """Nodes' host tiers that other nodes may read. No processes: nobody sends them messages."""


Message = (
    Generate | Abort | Update | Refused | Hello | HelloReply | Prefill | Accepted | BlocksReady | Prefilled
    | PrefillFailed | Renew | Release | Farewell | Report | Subscribe | Scrape | Scraped | KVWatch | KVSnapshot
    | KVEvents | KVClear | KVPin | KVUnpin | KVControlled | Membership
)  # fmt: skip

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)
_T = TypeVar("_T")


def encode(message: Message) -> bytes:
    """MessagePack of a message."""
    return _encoder.encode(message)


def decode(frame: bytes | memoryview) -> Message:
    """The message of a frame that came from outside.

    Raises:
        msgspec.DecodeError: not MessagePack, or not one of the messages above within its bounds.
    """
    return decode_with(_decoder, frame)


def decode_with(decoder: msgspec.msgpack.Decoder[_T], frame: bytes | memoryview) -> _T:
    """What ``decoder`` makes of a frame that came from outside; whatever is wrong with it, one kind of error.

    Raises:
        msgspec.DecodeError: see `decode`.
    """
    try:
        return decoder.decode(frame)
    except (UnicodeDecodeError, RecursionError) as error:
        raise msgspec.DecodeError(f"{type(error).__name__}: {error}") from None
