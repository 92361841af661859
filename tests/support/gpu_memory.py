"""GPU memory as the conformance tests see it, in this process or in another; and a GPU, or its stand-in, to have it on."""

from __future__ import annotations

import functools
import multiprocessing
import os
from typing import Any

import numpy as np
import torch
from tandem.kv_transfer.memory import DeviceBuffer
from tandem.kv_transfer.transports import Region, Transport
from tandem.kv_transfer.transports.cuda_ipc import CudaIpcTransport
from tandem.kv_transfer.transports.nixl import NixlTransport


@functools.cache
def prepare() -> list[Any]:
    """Where there is no GPU, the host takes its part, until `undo`."""
    if torch.cuda.is_available():
        return []
    from . import host_as_gpu

    return host_as_gpu.install()


def undo() -> None:
    """What `prepare` changed is as it was."""
    for patch in prepare():
        patch.stop()
    prepare.cache_clear()


class Array:
    """Just enough of an array: what is read or written goes through ``get`` and ``put``."""

    def get(self) -> np.ndarray:
        raise NotImplementedError

    def put(self, key: Any, value: Any) -> None:
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.get())

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self.get()

    def __getitem__(self, key: Any) -> Any:
        return self.get()[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self.put(key, value)

    def __eq__(self, other: object) -> Any:
        return self.get() == np.asarray(other)

    __hash__ = None  # type: ignore[assignment]

    def copy(self) -> np.ndarray:
        return self.get()

    def reshape(self, *shape: int) -> np.ndarray:
        return self.get().reshape(*shape)


class OnDevice(Array):
    """The content of a `DeviceBuffer`."""

    def __init__(self, buffer: DeviceBuffer) -> None:
        self._buffer = buffer
        self._host: np.ndarray | None = getattr(buffer.memory, "array", None)

    def get(self) -> np.ndarray:
        if self._host is not None:
            return self._host[: self._buffer.num_bytes].copy()
        return self._buffer.tensor().cpu().numpy()

    def put(self, key: Any, value: Any) -> None:
        if self._host is not None:
            self._host[key] = value
            return
        host = self.get()
        host[key] = value
        self._buffer.tensor().copy_(torch.from_numpy(host))
        torch.cuda.synchronize(self._buffer.device)


class SeenBuffer(DeviceBuffer):
    """A `DeviceBuffer`, zeroed, whose content tests see as ``array``, like a `Buffer`'s."""

    def __init__(self, num_bytes: int, device: int = 0) -> None:
        prepare()
        super().__init__(num_bytes, device)
        self.array = OnDevice(self)
        self.array[:] = 0


class OwnerProcess:
    """A process in which owners of GPU memory can be made. They end with it.

    Args:
        device: its GPU, as this process numbers them.
        alone: whether that GPU is the only one that it sees.
        transport: of the owners.
    """

    def __init__(self, device: int = 0, *, alone: bool = False, transport: str = "cuda_ipc") -> None:
        self.transport = transport
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_own, args=(theirs, device, alone, transport), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, *what: Any) -> Any:
        self._pipe.send(what)
        assert self._pipe.poll(120), "the owner does not answer"
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()


class RemoteOwner(Array):
    """An owner of GPU memory, "blocks", in another process; also the memory's content."""

    def __init__(self, process: OwnerProcess, num_bytes: int) -> None:
        self.process = process
        self._number = process.ask("make", num_bytes)
        self.array = self

    def get(self) -> np.ndarray:
        return self.process.ask("get", self._number)

    def put(self, key: Any, value: Any) -> None:
        self.process.ask("put", self._number, key, value)

    def descriptor(self) -> bytes:
        return self.process.ask("descriptor", self._number)

    def close(self) -> None:
        self.process.ask("close", self._number)

    def forget(self) -> None:
        """Free the memory."""
        self.process.ask("forget", self._number)


def _own(pipe: Any, device: int, alone: bool, transport: str) -> None:
    if alone:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(device)
        device = 0
    owned: dict[int, tuple[Transport, SeenBuffer]] = {}
    while True:
        try:
            what, number, *arguments = pipe.recv()
        except (EOFError, ConnectionError):
            return
        try:
            pipe.send(_obey(owned, device, transport, what, number, *arguments))
        except Exception as error:  # noqa: BLE001 - the test tells it
            pipe.send(error)


def _obey(owned: dict[int, Any], device: int, transport: str, what: str, number: int, *arguments: Any) -> Any:
    if what == "make":
        buffer = SeenBuffer(number, device)
        owner: Transport
        if transport == "nixl":
            owner = NixlTransport(lambda: None, device)
        else:
            owner = CudaIpcTransport(lambda: None, device, 16)
        owner.register(Region("blocks", buffer))
        owned[len(owned)] = owner, buffer
        return len(owned) - 1
    if owned[number] is None:
        return None
    owner, buffer = owned[number]
    match what:
        case "get":
            return buffer.array.get()
        case "put":
            return buffer.array.put(*arguments)
        case "descriptor":
            return owner.descriptor()
        case "close":
            return owner.close()
        case "forget":
            owned[number] = None
    return None
