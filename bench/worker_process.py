"""Workers without Ray, for benchmarks: each a process, with a GPU of its own if there is one.

`Workers` is the gateway's end; `python -m tandem.bench.worker_process PEER KEYS CONFIG` is one such worker.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Sequence

import msgspec

from ..cluster.mesh import Mesh
from ..cluster.worker_runtime import WorkerRuntime
from ..core.config import Config
from ..core.errors import WorkerError
from ..core.ids import PeerId, worker_of
from ..core.messages import Member, Membership, Message
from ..core.wire import ClusterKeys, SecureContext, make_cluster_keys

_GATEWAY = "gateway-0#1"
_ADDRESS = "127.0.0.1"
_END_S = 20.0


class Workers:
    """Processes that know each other, and this one as their gateway. Blocks until all can serve.

    Args:
        peers: their names, "prefill-0#1".
        config: of all.
        gpus: of each; empty: CPUs.
        receive: called with what a worker sends, on a thread that receives.

    Raises:
        WorkerError: one did not start.
    """

    def __init__(
        self,
        peers: Sequence[PeerId],
        config: Config,
        gpus: Sequence[int],
        receive: Callable[[PeerId, Message], None],
    ) -> None:
        keys = make_cluster_keys()
        self._context = SecureContext(keys)
        self._lost: list[PeerId] = []
        self.mesh = Mesh(_GATEWAY, self._context, None, receive, self._lost.append, lambda: None)
        seen: list[int | None] = list(gpus) if gpus else [None for _ in peers]
        self._processes = [_start(peer, keys, config, gpu) for peer, gpu in zip(peers, seen, strict=True)]
        self.members: list[Member] = []
        self.mesh.start()
        try:
            self.members += [_member(process) for process in self._processes]
            self.membership = Membership(1, [*self.members, Member(_GATEWAY, "gateway", "", "")])
            for process, member in zip(self._processes, self.members, strict=True):
                assert process.stdin is not None
                process.stdin.write(msgspec.msgpack.encode(self.membership).hex() + "\n")
                process.stdin.flush()
                self.mesh.connect(member.peer, member.endpoint)
        except BaseException:
            self.close()
            raise

    def check(self) -> None:
        """Raises WorkerError if one has gone."""
        gone = [process.args[-3] for process in self._processes if process.poll() is not None]  # type: ignore[index]
        if gone or self._lost:
            raise WorkerError(f"{', '.join([*map(str, gone), *self._lost])} ended, or cannot be reached")

    def close(self) -> None:
        """End them. Blocks until they have."""
        self.mesh.close()
        self._context.close()
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.close()
        for process in self._processes:
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdout is not None
            process.stdout.close()


def _start(peer: PeerId, keys: ClusterKeys, config: Config, gpu: int | None) -> subprocess.Popen[str]:
    sees = [] if gpu is None else ["env", f"CUDA_VISIBLE_DEVICES={gpu}"]
    encoded = msgspec.msgpack.encode(keys).hex()
    command = [*sees, sys.executable, "-m", __name__, peer, encoded, config.model_dump_json()]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _member(worker: subprocess.Popen[str]) -> Member:
    assert worker.stdout is not None
    line = worker.stdout.readline()
    if not line:
        raise WorkerError("a worker ended while it started", fix="what it says stands above")
    return msgspec.msgpack.decode(bytes.fromhex(line), type=Member)


def serve(peer: PeerId, keys: ClusterKeys, config: Config) -> None:
    """Be a worker until the standard input ends: tells its member record, then is told of the cluster."""
    role = worker_of(peer).rpartition("-")[0]
    runtime = WorkerRuntime(peer, role, config, keys, _ADDRESS, "node", lambda phase: None)
    member = runtime.start()
    print(msgspec.msgpack.encode(member).hex(), flush=True)
    for line in sys.stdin:
        runtime.follow(msgspec.msgpack.decode(bytes.fromhex(line), type=Membership))
    runtime.stop(1.0)


if __name__ == "__main__":
    serve(
        sys.argv[1],
        msgspec.msgpack.decode(bytes.fromhex(sys.argv[2]), type=ClusterKeys),
        Config.model_validate_json(sys.argv[3]),
    )
