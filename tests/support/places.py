"""The doctor's places as processes of their own, each with one GPU, as Ray makes them."""

from __future__ import annotations

import multiprocessing
import os
from typing import Any

import msgspec
from tandem.cluster.doctor.probe import Probe
from tandem.core.wire import ClusterKeys


class Place:
    """A `Probe` in a process that sees one GPU.

    Args:
        peer: the worker that would live there.
        device: the GPU's number on this machine.
        config: as JSON.
        keys: the same at all places.
    """

    def __init__(self, peer: str, device: int, config: str, keys: ClusterKeys) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = theirs, peer, device, config, msgspec.msgpack.encode(keys)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, method: str, *arguments: Any) -> Any:
        self._pipe.send((method, arguments))
        assert self._pipe.poll(180), f"no answer to {method}"
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        self._pipe.close()
        self._process.join(20)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _serve(pipe: Any, peer: str, device: int, config: str, keys: bytes) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = str(device)
    probe = Probe(peer, config, keys, "127.0.0.1")
    while True:
        try:
            method, arguments = pipe.recv()
        except (EOFError, ConnectionError):
            probe.close()
            return
        try:
            pipe.send(getattr(probe, method)(*arguments))
        except Exception as error:  # noqa: BLE001 - the test tells it
            pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))
