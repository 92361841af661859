"""GPU memory of CUDA's own, without CUDA: what is asked of it, in which order, and what becomes of its errors."""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.gpu_memory import undo
from tandem.core.errors import ConfigError
from tandem.kernels import cuda_memory
from tandem.kv_transfer.memory import DeviceBuffer


class Status(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorNotSupported = 801


class Runtime:
    """Stands for cuda.bindings.runtime: every call succeeds but those in ``fails``."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.fails: dict[str, list[Status]] = {}
        self.values: dict[str, Any] = {
            "cudaMalloc": 1 << 46,
            "cudaIpcGetMemHandle": SimpleNamespace(reserved=b"h" * 64),
        }

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            failures = self.fails.get(name)
            status = failures.pop(0) if failures else Status.cudaSuccess
            value = () if status or name not in self.values else (self.values[name],)
            return (status, *value)

        return call

    def count(self, name: str) -> int:
        return sum(call[0] == name for call in self.calls)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    undo()  # another test of this process may have made the host a GPU
    runtime = Runtime()
    monkeypatch.setattr(cuda_memory, "runtime", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    yield runtime
    assert runtime.count("cudaFree") == runtime.count("cudaMalloc") - runtime.values.get("failed", 0)


def test_memory_takes_whole_pieces_and_goes_with_its_last_user(runtime: Runtime) -> None:
    buffer = DeviceBuffer((2 << 20) + 1, 0)
    assert ("cudaMalloc", 4 << 20) in runtime.calls
    assert (buffer.kind, buffer.address, buffer.handle) == ("cuda", 1 << 46, b"h" * 64)
    user = buffer.memory
    assert user is not None
    assert user.__cuda_array_interface__["shape"] == ((2 << 20) + 1,)
    buffer.close()
    buffer.close()
    assert runtime.count("cudaFree") == 0
    del user
    assert runtime.calls[-2:] == [("cudaSetDevice", 0), ("cudaFree", 1 << 46)]


def test_nothing_is_freed_while_a_graph_is_recorded(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = cuda_memory.Allocation(1, 0)
    with monkeypatch.context() as recording:
        recording.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        del memory
    assert runtime.count("cudaFree") == 0
    memory = cuda_memory.Allocation(1, 0)
    assert runtime.count("cudaFree") == 1
    del memory


def test_lack_of_memory_is_told_after_torch_has_given_back_what_it_keeps(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_back: list[int] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given_back.append(1))
    runtime.fails["cudaMalloc"] = [Status.cudaErrorMemoryAllocation]
    runtime.values["failed"] = 3
    del (memory := [cuda_memory.Allocation(1, 0)])[0]
    assert memory == []
    assert given_back == [1]
    assert runtime.count("cudaGetLastError") == 1, "others would be told of the error"
    runtime.fails["cudaMalloc"] = [Status.cudaErrorMemoryAllocation] * 2
    with pytest.raises(torch.OutOfMemoryError):
        DeviceBuffer(1, 0)


def test_memory_that_cannot_be_shared_says_so_and_is_freed(runtime: Runtime) -> None:
    runtime.fails["cudaIpcGetMemHandle"] = [Status.cudaErrorNotSupported]
    with pytest.raises(ConfigError, match="cudaIpcGetMemHandle: cudaErrorNotSupported") as caught:
        DeviceBuffer(1, 0)
    assert "tandem[gpu]" in caught.value.fix
