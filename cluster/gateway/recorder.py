"""Records what a gateway serves, without any text, as a trace that `tandem tune` replays.

While nothing is recorded, a finished request costs one comparison; else the hashes of its prompt, about 30 µs for each
512 tokens, when the last token is there.
"""

from __future__ import annotations

import hashlib
from array import array
from typing import NamedTuple

import msgspec

from ...core.clock import Clock
from ...core.errors import RequestError
from ...kv_transfer.offload.trace import TRACE_BLOCK_TOKENS, TraceRequest
from .live import LiveRequest

MOST_REQUESTS = 100_000
_MOST_BLOCKS = 1 << 21
_BLOCK_BYTES = 4 * TRACE_BLOCK_TOKENS


class _Request(NamedTuple):
    arrived_s: float
    input_length: int
    output_length: int
    hashes: list[bytes]


class TraceRecorder:
    """See the module. Belongs to the gateway's event loop.

    Args:
        clock: the one by which requests arrive.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._started_s: float | None = None
        self._requests: list[_Request] = []
        self._num_blocks = 0
        self._max_requests = 0

    def start(self, max_requests: int = MOST_REQUESTS) -> None:
        """Record the requests that arrive from now on, so many at most.

        Raises:
            RequestError: somebody is recording.
        """
        if self._started_s is not None:
            raise RequestError("a trace is being recorded", fix="POST /admin/trace/stop ends it", status=409)
        self._started_s, self._max_requests = self._clock.monotonic_s(), max_requests
        self._num_blocks = 0

    def stop(self) -> bytes:
        """End the recording: its requests, in the order of their arrival, as JSON lines. Those that have not been
        answered by now are left out.

        Raises:
            RequestError: nothing is recorded.
        """
        if self._started_s is None:
            raise RequestError("no trace is being recorded", fix="POST /admin/trace/start begins one", status=409)
        started_s, self._started_s = self._started_s, None
        requests, self._requests = self._requests, []
        numbers: dict[bytes, int] = {}
        lines = [
            TraceRequest(
                timestamp=round((request.arrived_s - started_s) * 1e3, 3),
                input_length=request.input_length,
                output_length=request.output_length,
                hash_ids=tuple(numbers.setdefault(key, len(numbers)) for key in request.hashes),
            )
            for request in sorted(requests, key=lambda request: request.arrived_s)
        ]
        return b"".join(msgspec.json.encode(line) + b"\n" for line in lines)

    def finished(self, live: LiveRequest) -> None:
        """A request is over."""
        if self._started_s is None or live.arrived_s < self._started_s:
            return
        if len(self._requests) >= self._max_requests or self._num_blocks >= _MOST_BLOCKS:
            return
        hashes = _hashes(live.tokens, live.salt)
        self._num_blocks += len(hashes)
        num_outputs = sum(len(output.tokens) for output in live.outputs.values())
        self._requests.append(_Request(live.arrived_s, len(live.tokens), num_outputs, hashes))


def _hashes(tokens: list[int], salt: str) -> list[bytes]:
    """One for each block of a prompt, the last of which may be partial; equal for equal prefixes of a tenant."""
    data = array("I", tokens).tobytes()
    parent = hashlib.blake2b(salt.encode(), digest_size=16, person=b"tandem-trace").digest()
    hashes = []
    for start in range(0, len(data), _BLOCK_BYTES):
        parent = hashlib.blake2b(parent + data[start : start + _BLOCK_BYTES], digest_size=16).digest()
        hashes.append(parent)
    return hashes
