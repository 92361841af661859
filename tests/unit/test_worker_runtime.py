"""A worker's threads and sockets, in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.checkpoints import make_checkpoint
from support.gateway import wait_for
from tandem.cluster.mesh import Mesh
from tandem.cluster.worker_runtime import WorkerRuntime
from tandem.core.config import Config
from tandem.core.messages import Child, Generate, Message, Report, Sampling, Stopping, Subscribe
from tandem.core.wire import SecureContext, make_cluster_keys


class Client:
    """A gateway's connection to a worker."""

    def __init__(self, context: SecureContext, worker: str, endpoint: str) -> None:
        self._worker = worker
        self.reports: list[Report] = []
        self._mesh = Mesh("gateway-0#1", context, None, self._receive, lambda peer: None, lambda: None)
        self._mesh.start()
        self._mesh.connect(worker, endpoint)
        self.send(Subscribe())

    def send(self, message: Message) -> None:
        self._mesh.send(self._worker, message)

    def close(self) -> None:
        self._mesh.close()

    def _receive(self, sender: str, message: Message) -> None:
        if isinstance(message, Report):
            self.reports.append(message)


@pytest.fixture
def context() -> Iterator[SecureContext]:
    context = SecureContext(make_cluster_keys())
    yield context
    context.close()


def test_a_gateway_that_connects_again_has_given_up_what_it_had_asked_for(
    tmp_path: Path, context: SecureContext
) -> None:
    """It had lost the worker, and sent its requests elsewhere: they would be computed for nobody."""
    make_checkpoint("qwen3_moe", tmp_path)
    config = Config.model_validate({"model": {"path": str(tmp_path)}, "pools": {"colocated": {}}})
    worker = WorkerRuntime("colocated-0#1", "colocated", config, context._keys, "127.0.0.1", "n", lambda phase: None)
    endpoint = worker.start().endpoint
    try:
        first = Client(context, "colocated-0#1", endpoint)
        first.send(
            Generate(
                1, "r", [1, 2, 3], 3, [Child(0, 0)], Sampling(), Stopping(worker._parts.worker._max_model_len - 10)
            )
        )
        wait_for(lambda: worker._parts.worker.report().running == 1, 20, "the request to run")
        first.close()
        second = Client(context, "colocated-0#1", endpoint)
        wait_for(lambda: second.reports, 20, "a report")
        wait_for(lambda: worker._parts.worker.drained(), 20, "the request's end")
        assert worker._parts.worker.report().output_tokens < worker._parts.worker._max_model_len - 10
        second.close()
    finally:
        worker.stop(0)
