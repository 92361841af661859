"""A client that costs little: one connection a request, server-sent events read as they come.

General HTTP clients spend a tenth of a millisecond on every chunk, which on a shared core would be measured as the
server's. This one speaks just enough HTTP/1.1 for one streamed POST.
"""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any, NamedTuple
from urllib.parse import urlsplit

_LIMIT = 1 << 22


class Reply(NamedTuple):
    """What happened to one request. Times are seconds on the monotonic clock."""

    sent_s: float
    token_times_s: list[float]
    """When each token's chunk arrived; several tokens of one chunk count once each."""
    end_s: float
    error: str
    tokens: list[int]
    request_id: str


class Server:
    """An OpenAI-compatible server.

    Args:
        url: "http://host:port".
        api_key: or "".
    """

    def __init__(self, url: str, api_key: str = "") -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._authorization = f"Authorization: Bearer {api_key}\r\n" if api_key else ""

    async def complete(self, body: dict[str, Any]) -> Reply:
        """Stream one completion; ``body`` is the request's, ``stream`` and ``return_token_ids`` are added."""
        payload = json.dumps({**body, "stream": True, "return_token_ids": True}).encode()
        sent_s = time.perf_counter()
        times: list[float] = []
        tokens: list[int] = []
        error, request_id = "", ""
        try:
            reader, writer = await asyncio.open_connection(self._host, self._port, limit=_LIMIT)
            try:
                writer.write(self._head("POST", "/v1/completions", len(payload)) + payload)
                status, headers = await _read_head(reader)
                request_id = headers.get("x-request-id", "")
                if status != 200:
                    error = f"{status}: {(await _read_body(reader, headers))[:500].decode(errors='replace')}"
                else:
                    error = await self._follow(reader, times, tokens)
            finally:
                writer.close()
        except (OSError, asyncio.IncompleteReadError, ValueError) as problem:
            error = f"{type(problem).__name__}: {problem}"
        return Reply(sent_s, times, time.perf_counter(), error, tokens, request_id)

    async def get(self, path: str) -> tuple[int, str]:
        """Status and text of a GET."""
        reader, writer = await asyncio.open_connection(self._host, self._port, limit=_LIMIT)
        try:
            writer.write(self._head("GET", path, 0))
            status, headers = await _read_head(reader)
            return status, (await _read_body(reader, headers)).decode()
        finally:
            writer.close()

    async def _follow(self, reader: asyncio.StreamReader, times: list[float], tokens: list[int]) -> str:
        """Read events to the end; returns what went wrong, or ""."""
        done = False
        async for chunk in _chunks(reader):
            now_s = time.perf_counter()
            for line in chunk.split(b"\n\n"):
                if line == b"data: [DONE]":
                    done = True
                elif line.startswith(b"data: "):
                    event = json.loads(line[6:])
                    if "error" in event:
                        return str(event["error"]["message"])
                    for choice in event["choices"]:
                        tokens.extend(choice["token_ids"])
                        times.extend([now_s] * len(choice["token_ids"]))
        return "" if done else "the stream ended without [DONE]"

    def _head(self, method: str, path: str, length: int) -> bytes:
        return (
            f"{method} {path} HTTP/1.1\r\nHost: {self._host}\r\n{self._authorization}"
            f"Content-Type: application/json\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
        ).encode()


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = {}
    for line in head[1:]:
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    return int(head[0].split()[1]), headers


async def _read_body(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    if "content-length" in headers:
        return await reader.readexactly(int(headers["content-length"]))
    return b"".join([chunk async for chunk in _chunks(reader)])


async def _chunks(reader: asyncio.StreamReader) -> Any:
    """The pieces of a chunked body."""
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        yield (await reader.readexactly(size + 2))[:-2]
    await reader.readuntil(b"\r\n")
