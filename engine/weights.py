"""Filling a model's memory from safetensors files.

Files are mapped, never read whole. A mapping's pages count as this process's memory while it is open, so a file is
closed and opened again after every `_MAPPED_BYTES` copied: the peak stays near the weights' own size.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import safetensors
import torch

from ..core.errors import ConfigError
from ..kernels.schemes.destination import Destination
from .models.names import alternatives, destinations, elsewhere, ignored

if TYPE_CHECKING:
    from .models.decoder import Decoder

_MAPPED_BYTES = 64 << 20
_SAMPLED_BYTES = 1 << 16
_HEADER_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8",
}  # fmt: skip
"""Types in headers of safetensors files."""

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


def check_weights(model: Decoder, folder: Path | None) -> None:
    """Find out before memory is taken whether a checkpoint can be loaded.

    Args:
        model: may be on the meta device.
        folder: whose headers are compared with it; None: weights will be made up.

    Raises:
        ConfigError: as `load_weights`, but for what tensors hold.
    """
    if folder is None:
        destinations(model)
    else:
        _plan(model, folder)


def load_weights(model: Decoder, folder: Path, progress: Progress | None = None) -> None:
    """Copy a checkpoint into a model, or a rank's part of it. Blocks.

    Args:
        model: its tensors are overwritten. What other ranks hold is not copied.
        folder: holds model.safetensors, or shards and their index.
        progress: told as bytes arrive.

    Raises:
        ConfigError: a file or tensor is missing, unexpected, of another shape or type, or does not hold what it must;
            names it, with expected and found.
    """
    plan = _plan(model, folder)
    total = sum(place.tensor.nbytes for _, places in plan for place in places.values())
    done = 0
    for file, places in plan:
        for key, place in places.items():
            try:
                place.fill(file.get(key, place))
            except ValueError as error:
                raise ConfigError(f"{file.path}: tensor {key}: {error}", fix="get the checkpoint again") from None
            done += place.tensor.nbytes
            if progress is not None:
                progress(done, total)
        file.close()
    model.absorb()


def _plan(model: Decoder, folder: Path) -> list[tuple[_File, dict[str, Destination]]]:
    """Where each tensor of each file goes; by the files' headers alone."""
    wanted = destinations(model)
    names = {other: name for name in wanted for other in (name, *alternatives(name))}
    others = {other for name in elsewhere(model) for other in (name, *alternatives(name))}
    missing = {name for name, place in wanted.items() if not place.optional}
    plan = []
    for file in map(_File, _shards(folder)):
        places = {}
        for key in file.keys():  # noqa: SIM118
            name = names.get(key)
            if name is not None:
                _check(file, key, wanted[name])
                places[key] = wanted[name]
                missing.discard(name)
            elif key not in others and not ignored(key, model.spec):
                raise ConfigError(
                    f"{file.path}: unexpected tensor {key}: {model.spec.architecture} has none of that name"
                    f"{_of_another_scheme(key, wanted, model)}"
                )
        file.close()
        plan.append((file, places))
    if missing:
        first = sorted(missing)[0]
        raise ConfigError(f"{folder}: {len(missing)} tensors are missing, among them {first}")
    return plan


def _check(file: _File, key: str, place: Destination) -> None:
    found, expected = file.shape(key), list(place.shape)
    if found != expected and not (not expected and found == [1]):
        raise ConfigError(f"{file.path}: tensor {key} has shape {found}, config.json says {expected}")
    dtype, known = file.dtype(key), [_HEADER_NAMES[dtype] for dtype in place.dtypes]
    if dtype not in known:
        raise ConfigError(f"{file.path}: tensor {key} has the type {dtype}, config.json says {' or '.join(known)}")


def _of_another_scheme(key: str, wanted: dict[str, Destination], model: Decoder) -> str:
    """What to say of a tensor whose module the model has, made of other tensors."""
    module = key.rpartition(".")[0] + "."
    siblings = sorted(name.removeprefix(module) for name in wanted if name.startswith(module))
    if not siblings:
        return ""
    quantization = model.spec.quantization
    how = "not quantised" if quantization is None else f"quantised by {quantization.method}"
    return f"; config.json says that the model is {how}, and {module[:-1]} is made of {', '.join(siblings)}"


def num_bytes(model: Decoder) -> int:
    """Of a model's weights."""
    return sum(place.tensor.nbytes for place in destinations(model).values())


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
            if place.dummy is not None:
                place.fill(place.part_of(place.dummy(place.shape, generator)))
                continue
            whole = tensor if place.is_whole else torch.empty(place.shape, dtype=tensor.dtype, device=tensor.device)
            whole.normal_(0.0, 0.02, generator=generator)
            if whole is not tensor:
                tensor.copy_(place.part_of(whole))
    model.absorb()
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
        self._opened: Any = None

    @property
    def _file(self) -> Any:
        if self._opened is None:
            try:
                self._opened = safetensors.safe_open(str(self.path), framework="pt", device="cpu")
            except (OSError, safetensors.SafetensorError) as error:
                raise ConfigError(f"{self.path}: not a readable safetensors file: {error}") from None
        return self._opened

    def close(self) -> None:
        """Until it is used again."""
        self._opened = None
        self._mapped = 0

    def keys(self) -> list[str]:
        return list(self._file.keys())

    def shape(self, key: str) -> list[int]:
        return list(self._file.get_slice(key).get_shape())

    def dtype(self, key: str) -> str:
        """As the header names it: "BF16"."""
        return str(self._file.get_slice(key).get_dtype())

    def get(self, key: str, place: Destination) -> torch.Tensor:
        """The part of a tensor that goes to a place, mapped."""
        if place.is_whole:
            tensor = cast(torch.Tensor, self._file.get_tensor(key))
        else:
            index = (*[slice(None)] * place.dim, slice(place.start, place.stop))
            tensor = cast(torch.Tensor, self._file.get_slice(key)[index])
        # From its first byte to its last, as a part of the columns is spread over all rows.
        span = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
        self._mapped += span * tensor.element_size()
        if self._mapped > _MAPPED_BYTES:
            self.close()
        return tensor


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
