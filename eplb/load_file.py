"""Recorded loads of experts: JSON lines, one that says of what, and then one for each window of steps."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..core.errors import ConfigError
from .placement import Placement, Topology, plan

_MAX_LAYERS = 1024
_MAX_EXPERTS = 1 << 14
_MAX_TOKENS = 1 << 50
_MAX_LINE_BYTES = 256 << 20
_MAX_WINDOWS = 1 << 20

_Line = TypeVar("_Line")
_Tokens = Annotated[int, msgspec.Meta(ge=0, le=_MAX_TOKENS)]


class LoadHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The first line."""

    num_layers: Annotated[int, msgspec.Meta(ge=1, le=_MAX_LAYERS)]
    num_logical: Annotated[int, msgspec.Meta(ge=1, le=_MAX_EXPERTS)]
    """Experts of a layer."""
    model: Annotated[str, msgspec.Meta(max_length=1024)] = ""
    """Whatever names it to a reader."""
    format: Literal["tandem-expert-load-1"] = "tandem-expert-load-1"


class LoadEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Every other line."""

    steps: Annotated[int, msgspec.Meta(ge=1, le=_MAX_TOKENS)]
    """Steps of the engine that it adds up."""
    tokens: Annotated[list[Annotated[list[_Tokens], msgspec.Meta(max_length=_MAX_EXPERTS)]],
                      msgspec.Meta(max_length=_MAX_LAYERS)]  # fmt: skip
    """[layers, logical]: tokens that each expert got, over all ranks."""


class RecordedLoad(NamedTuple):
    """A whole file."""

    model: str
    steps: NDArray[np.int64]
    """[windows] steps of each window."""
    tokens: NDArray[np.int64]
    """[windows, layers, logical]."""

    def load(self, windows: slice = slice(None)) -> NDArray[np.float64]:
        """[layers, logical] float64: the sum of some windows, or all, as `placement.plan` takes it."""
        load: NDArray[np.float64] = self.tokens[windows].sum(0, dtype=np.float64)
        return load


def write_load(path: Path, recorded: RecordedLoad) -> None:
    """Write a file. Blocks.

    Raises:
        ConfigError: it cannot be written.
    """
    _, num_layers, num_logical = recorded.tokens.shape
    lines: Iterable[msgspec.Struct] = [
        LoadHeader(num_layers, num_logical, recorded.model),
        *(
            LoadEntry(int(steps), tokens.tolist())
            for steps, tokens in zip(recorded.steps, recorded.tokens, strict=True)
        ),
    ]
    try:
        path.write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None


def read_load(path: Path) -> RecordedLoad:
    """Read a file. Blocks.

    Raises:
        ConfigError: it cannot be read, or is none; names the line and what is wrong.
    """
    decoder = msgspec.json.Decoder(LoadEntry)
    steps: list[int] = []
    windows: list[NDArray[np.int64]] = []
    try:
        with path.open("rb") as lines:
            header = _decode(path, 1, lines.readline(_MAX_LINE_BYTES), msgspec.json.Decoder(LoadHeader))
            shape = (header.num_layers, header.num_logical)
            for number in range(2, _MAX_WINDOWS + 2):
                line = lines.readline(_MAX_LINE_BYTES)
                if not line:
                    break
                entry = _decode(path, number, line, decoder)
                if len(entry.tokens) != shape[0] or {len(row) for row in entry.tokens} != {shape[1]}:
                    raise _bad(path, number, f"`tokens` is not of {shape[0]} layers with {shape[1]} experts each")
                steps.append(entry.steps)
                windows.append(np.array(entry.tokens, dtype=np.int64))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}", fix="give a recorded load of experts") from None
    if not windows:
        raise ConfigError(f"{path}: there is no load in it, only its first line")
    return RecordedLoad(header.model, np.array(steps, dtype=np.int64), np.stack(windows))


def warm_up_placement(path: Path, num_layers: int, num_logical: int, topology: Topology) -> Placement:
    """The placement to start with, for a load that was recorded before. Blocks.

    Args:
        path: of the file.
        num_layers: layers of the model that will serve.
        num_logical: experts of a layer.
        topology: of the ranks that will serve.

    Raises:
        ConfigError: as of `read_load`, or the load is of another model.
        PlacementError: as of `plan`.
    """
    load = read_load(path).load()
    if load.shape != (num_layers, num_logical):
        raise ConfigError(
            f"{path}: the load is of {load.shape[0]} layers with {load.shape[1]} experts each, expected {num_layers} "
            f"with {num_logical}",
            fix="record it with the model that serves",
        )
    return plan(load, topology)


def _decode(path: Path, number: int, line: bytes, decoder: msgspec.json.Decoder[_Line]) -> _Line:
    try:
        return decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _bad(path, number, str(error)) from None


def _bad(path: Path, number: int, problem: str) -> ConfigError:
    return ConfigError(
        f"{path}:{number}: {problem}",
        fix="the first line is a JSON object with format, num_layers, num_logical and model, each other with steps and "
        "tokens",
    )
