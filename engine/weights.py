"""Filling a model's memory from safetensors files.

Files are mapped, never read whole. A mapping's pages count as this process's memory while it is open, so a file is
closed and opened again after every `_MAPPED_BYTES` copied: the peak stays near the weights' own size.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import safetensors
import torch

from ..core.errors import ConfigError
from .models.names import Destination, alternatives, destinations, elsewhere, ignored

if TYPE_CHECKING:
    from .models.decoder import Decoder

_MAPPED_BYTES = 64 << 20
_SAMPLED_BYTES = 1 << 16

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


def load_weights(model: Decoder, folder: Path, progress: Progress | None = None) -> None:
    """Copy a checkpoint into a model, or a rank's part of it. Blocks.

    Args:
        model: its tensors are overwritten. What other ranks hold is not copied.
        folder: holds model.safetensors, or shards and their index.
        progress: told as bytes arrive.

    Raises:
        ConfigError: a file or tensor is missing, unexpected, or of another shape; names it, with expected and found.
    """
    wanted = destinations(model)
    names = {other: name for name in wanted for other in (name, *alternatives(name))}
    others = {other for name in elsewhere(model) for other in (name, *alternatives(name))}
    total = sum(_num_bytes(place.tensor) for place in wanted.values())
    done = 0
    missing = set(wanted)
    for file, key in _tensors(folder):
        name = names.get(key)
        if name is None:
            if ignored(key, model.spec.tied_embeddings) or key in others:
                continue
            raise ConfigError(f"{file.path}: unexpected tensor {key}: {model.spec.architecture} has none of that name")
        place = wanted[name]
        found, expected = file.shape(key), list(place.shape)
        if found != expected:
            raise ConfigError(f"{file.path}: tensor {key} has shape {found}, config.json says {expected}")
        place.tensor.copy_(file.get(key, place))
        missing.discard(name)
        done += _num_bytes(place.tensor)
        if progress is not None:
            progress(done, total)
    if missing:
        first = sorted(missing)[0]
        raise ConfigError(f"{folder}: {len(missing)} tensors are missing, among them {first}")


def num_bytes(model: Decoder) -> int:
    """Of a model's weights."""
    return sum(_num_bytes(place.tensor) for place in destinations(model).values())


def fill_dummy(model: Decoder, seed: int) -> None:
    """Random weights of a trained model's size, the same for every worker: for benchmarks.

    A tensor depends on the seed and its name alone, so that the ranks of a group hold parts of one model.
    """
    generator = torch.Generator(device=model.device)
    for name, place in destinations(model).items():
        tensor = place.tensor
        if name.endswith("norm.weight"):
            tensor.fill_(1.0)
        elif name.endswith(".bias"):
            tensor.zero_()
        else:
            digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
            generator.manual_seed(int.from_bytes(digest, "little"))
            whole = tensor if place.is_whole else torch.empty(place.shape, dtype=tensor.dtype, device=tensor.device)
            whole.normal_(0.0, 0.02, generator=generator)
            if whole is not tensor:
                tensor.copy_(place.part_of(whole))
    if model.device.type == "cuda":
        # Whoever plans the cache counts what the device has free, not what torch keeps for later.
        torch.cuda.empty_cache()


def fingerprint(folder: Path, load: str, dtype: str, seed: int) -> str:
    """Which model this is: 32 hex digits over config.json, the tensors' names, shapes and places, and samples of the
    data.

    Equal on hosts that have equal files, whatever their paths and dates.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update((folder / "config.json").read_bytes())
    digest.update(f"{load} {dtype}".encode())
    if load == "dummy":
        digest.update(str(seed).encode())
        return digest.hexdigest()
    for path in _shards(folder):
        size = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(8)
            if len(header) == 8:
                digest.update(file.read(min(struct.unpack("<Q", header)[0], size)))
            for part in range(8):
                file.seek(size * part // 8)
                digest.update(file.read(_SAMPLED_BYTES))
    return digest.hexdigest()


class _File:
    """One safetensors file, opened anew when too much of it is mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mapped = 0
        self._open()

    def _open(self) -> None:
        try:
            self._file: Any = safetensors.safe_open(str(self.path), framework="pt", device="cpu")
        except (OSError, safetensors.SafetensorError) as error:
            raise ConfigError(f"{self.path}: not a readable safetensors file: {error}") from None

    def keys(self) -> list[str]:
        return list(self._file.keys())

    def shape(self, key: str) -> list[int]:
        return list(self._file.get_slice(key).get_shape())

    def get(self, key: str, place: Destination) -> torch.Tensor:
        """The part of a tensor that goes to a place, mapped."""
        start, stop = place.start, place.start + place.tensor.shape[place.dim]
        part = self._file.get_slice(key)
        tensor = cast(torch.Tensor, part[start:stop] if place.dim == 0 else part[:, start:stop])
        # From its first byte to its last, as a part of the columns is spread over all rows.
        span = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
        self._mapped += span * tensor.element_size()
        if self._mapped > _MAPPED_BYTES:
            self._mapped = 0
            self._open()
        return tensor


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _tensors(folder: Path) -> Iterator[tuple[_File, str]]:
    for path in _shards(folder):
        file = _File(path)
        for key in file.keys():  # noqa: SIM118
            yield file, key


def _shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise ConfigError(f"{index}: not a checkpoint's index: {error!r}") from None
        paths = [folder / str(name) for name in sorted(names)]
    else:
        paths = [folder / "model.safetensors"]
    for path in paths:
        if path.parent != folder or not path.is_file():
            raise ConfigError(
                f"{path}: no such file", fix="weights are read from safetensors; model.load: dummy needs none"
            )
    return paths
