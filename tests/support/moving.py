"""A process that moves bytes for this one, as a rank of a worker does, between memory that both have mapped."""

from __future__ import annotations

import mmap
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping

import msgspec
import numpy as np
from tandem.core.frames import receive_frame, send_frame
from tandem.core.wire import ClusterKeys, SecureContext, make_cluster_keys
from tandem.kv_transfer.memory import Buffer
from tandem.kv_transfer.transports import Read, Region, TransferResult, Transport
from tandem.kv_transfer.transports.base import Notify
from tandem.kv_transfer.transports.forwarded import ForwardedTransport, forwarded
from tandem.kv_transfer.transports.mover import Mover
from tandem.kv_transfer.transports.mover_link import MoverLink
from tandem.kv_transfer.transports.shm import ShmTransport
from tandem.kv_transfer.transports.zmq import ZmqTransport

_MAX_BYTES = 1 << 20


class MovingProcess:
    """Transports of a child process, each with a mover and a connection of its own."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
            )
        self._links: list[MoverLink] = []
        send_frame(self._control, msgspec.msgpack.encode(make_cluster_keys()))

    def make(self, name: str, notify: Notify) -> MovedTransport:
        """A transport of the child, which comes to be when its regions are known."""
        return MovedTransport(self, name, notify)

    def start(self, name: str, regions: Mapping[str, Buffer], notify: Notify, after: int) -> MoverLink:
        """Let the child move bytes to and from these regions; reads wait for ``after`` copies, told by `copied`."""
        ours, theirs = socket.socketpair()
        with theirs:
            sizes = {region: len(buffer.array) for region, buffer in regions.items()}
            send_frame(self._control, msgspec.msgpack.encode((name, sizes)))
            files = [buffer.shared.descriptor for buffer in regions.values() if buffer.shared]
            socket.send_fds(self._control, [b"\0"], [theirs.fileno(), *files])
        self._links.append(MoverLink(ours, "the child", notify, lambda: after))
        return self._links[-1]

    def copied(self, count: int) -> None:
        """Let the newest mover know that so many copies are done."""
        send_frame(self._control, msgspec.msgpack.encode((str(count), {})))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        for link in self._links:
            link.close()
        self._control.close()
        self.process.wait(10)


class MovedTransport:
    """See `Transport`: this process's memory, registered by the child."""

    converts = False
    memory = frozenset({"host"})

    def __init__(self, moving: MovingProcess, name: str, notify: Notify) -> None:
        self.name = name
        self.after = 0
        self._moving = moving
        self._notify = notify
        self._regions: dict[str, Buffer] = {}
        self._link: MoverLink | None = None
        self._transport: ForwardedTransport | None = None

    def register(self, region: Region) -> None:
        self._regions[region.name] = region.buffer

    def descriptor(self) -> bytes:
        return self._forwarded().descriptor()

    def add_peer(self, peer: str, descriptor: bytes) -> None:
        self._forwarded().add_peer(peer, descriptor)

    def remove_peer(self, peer: str) -> None:
        self._forwarded().remove_peer(peer)

    def submit(self, read: Read) -> int:
        return self._forwarded().submit(read)

    def poll(self) -> list[TransferResult]:
        return self._forwarded().poll()

    def cancel(self, numbers: Iterable[int]) -> set[int]:
        return self._forwarded().cancel(numbers)

    def close(self) -> None:
        if self._transport is not None and self._link is not None:
            self._transport.close()
            self._link.close()

    def _forwarded(self) -> ForwardedTransport:
        if self._transport is None:
            self._link = self._moving.start(self.name, self._regions, self._notify, self.after)
            self._transport = forwarded(self._link)[self.name]
        return self._transport


class _Mapped(Buffer):
    """A buffer of another process."""

    def __init__(self, descriptor: int, num_bytes: int) -> None:
        super().__init__(1)
        own = self
        assert own.shared is not None
        token = os.readlink(f"/proc/self/fd/{descriptor}").removeprefix("/memfd:tandem-").removesuffix(" (deleted)")
        self.shared = msgspec.structs.replace(
            own.shared, pid=os.getpid(), descriptor=descriptor, token=token, num_bytes=num_bytes
        )
        self.array = np.frombuffer(mmap.mmap(descriptor, num_bytes), np.uint8)


def main(control: socket.socket) -> None:
    """Be the child, until the parent closes."""
    keys = msgspec.msgpack.decode(receive_frame(control, _MAX_BYTES), type=ClusterKeys)
    context = SecureContext(keys)
    mover: Mover | None = None
    while True:
        try:
            name, sizes = msgspec.msgpack.decode(receive_frame(control, _MAX_BYTES), type=tuple[str, dict[str, int]])
        except EOFError:
            return
        if name.isdigit():
            assert mover is not None
            mover.copied(int(name), lambda: None)
            continue
        _, files, _, _ = socket.recv_fds(control, 1, 16)
        regions = [
            Region(region, _Mapped(descriptor, size))
            for (region, size), descriptor in zip(sizes.items(), files[1:], strict=True)
        ]

        def make(notify: Notify, on_bad_frame: Callable[[], None], name: str = name) -> dict[str, Transport]:
            if name == "shm":
                return {name: ShmTransport(notify)}
            return {name: ZmqTransport(notify, context, "127.0.0.1", on_bad_frame)}

        mover = Mover(socket.socket(fileno=files[0]), make, regions)
        threading.Thread(target=mover.run, daemon=True).start()


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)
