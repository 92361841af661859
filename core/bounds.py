"""How large the parts of a message may be."""

from __future__ import annotations

from typing import Annotated, Final

from msgspec import Meta

MAX_TOKENS: Final = 1 << 22
MAX_CHILDREN: Final = 128
MAX_LOGPROBS: Final = 20
MAX_RANKS: Final = 1024
MAX_PRIORITY: Final = (1 << 31) - 1

MAX_TEXT: Final = 4096

Name = Annotated[str, Meta(max_length=256)]
Text = Annotated[str, Meta(max_length=MAX_TEXT)]
FileName = Annotated[str, Meta(pattern=r"^([0-9a-f]{32})?\Z")]
"""Made by a gateway, never by a client; empty: none."""
FILE_SUFFIX: Final = ".safetensors"
"""Of what is written by such a name."""
TraceParent = Annotated[str, Meta(pattern=r"^(00-[0-9a-f]{32}-[0-9a-f]{16}-01)?\Z")]
"""Of a request that is traced, as in W3C's header; empty: it is not."""
Count = Annotated[int, Meta(ge=0, le=1 << 40)]
TokenId = Annotated[int, Meta(ge=0, lt=1 << 31)]
TokenIds = Annotated[list[TokenId], Meta(max_length=MAX_TOKENS)]
Priority = Annotated[int, Meta(ge=-MAX_PRIORITY, le=MAX_PRIORITY)]
"""Of a request: a lower one is served sooner."""
Seed = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Seconds = Annotated[float, Meta(ge=0, le=1e12)]
