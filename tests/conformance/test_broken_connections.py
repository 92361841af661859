"""What becomes of a read whose connection stalls, and breaks."""

from __future__ import annotations

import contextlib
import socket
import threading

from conformance.test_transports import Ends, Kit
from support.transports import runs


class Relay:
    """A TCP connection between a reader and an owner that can stall and break."""

    def __init__(self, endpoint: str) -> None:
        host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self.flows = threading.Event()
        self.flows.set()
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
                self._open += [near, far]
                for source, target in ((near, far), (far, near)):
                    threading.Thread(target=self._pass_on, args=(source, target), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self.flows.wait()
                target.sendall(data)

    def cut(self) -> None:
        for end in self._open:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._open.clear()
        self.flows.set()

    def close(self) -> None:
        self.cut()
        self._listener.close()


def test_a_read_whose_connection_breaks_ends_and_the_next_one_succeeds() -> None:
    """The answer is lost with the connection: without an error the read would never end, nor its blocks be freed."""
    kit = Kit("zmq")
    ends = Ends(kit)
    relay = Relay(ends.owner.descriptor().decode())
    try:
        ends.reader.add_peer("prefill-1#1", relay.endpoint.encode())
        first = ends.read(runs((0, 0, 64)), peer="prefill-1#1")
        assert ends.wait(first)[first].error == ""
        relay.flows.clear()
        lost = ends.read(runs((0, 64, 64)), peer="prefill-1#1")
        assert not ends.news.wait(0.3)
        relay.cut()
        assert ends.wait(lost)[lost].error == "the connection to prefill-1#1 broke"
        again = ends.read(runs((0, 128, 64)), peer="prefill-1#1")
        assert ends.wait(again)[again].error == ""
        assert (ends.target.array[128:192] == ends.source.array[:64]).all()
    finally:
        relay.close()
        kit.close()
