"""Authenticated ZMQ sockets: CURVE with one key pair for servers and one for clients, made per cluster.

A server admits only the cluster's client key; both secrets reach processes through Ray alone. Every socket is bounded
in message size and queue length, does not linger, and notices a silent peer by heartbeats.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
from collections import deque
from collections.abc import Callable

import msgspec
import zmq
import zmq.auth.thread
from zmq.utils.monitor import recv_monitor_message

from .messages import MAX_MESSAGE_BYTES

HEARTBEAT_INTERVAL_S = 2.0
HEARTBEAT_TIMEOUT_S = 8.0
QUEUED_MESSAGES = 100_000


class ClusterKeys(msgspec.Struct, frozen=True):
    """The cluster's two CURVE key pairs, in Z85."""

    server_public: bytes
    server_secret: bytes
    client_public: bytes
    client_secret: bytes

    def __repr__(self) -> str:
        return "ClusterKeys(…)"


def make_cluster_keys() -> ClusterKeys:
    """Fresh random keys."""
    return ClusterKeys(*zmq.curve_keypair(), *zmq.curve_keypair())


class SecureContext:
    """A ZMQ context that makes the cluster's sockets. Thread-safe; sockets belong to the thread that uses them.

    Args:
        keys: the cluster's.
        on_denied: called, on threads of its own, for each connection that is turned away: with foreign keys, without
            any, or speaking something else.
        encrypt: False leaves the sockets bare: for measuring what encryption costs, never for serving.
    """

    def __init__(self, keys: ClusterKeys, on_denied: Callable[[], None] | None = None, *, encrypt: bool = True) -> None:
        self._keys = keys
        self._encrypt = encrypt
        self._on_denied = on_denied
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._guard: _Guard | None = None
        self._authenticator: zmq.auth.thread.ThreadAuthenticator | None = None
        if encrypt:
            self._authenticator = zmq.auth.thread.ThreadAuthenticator(self._context)
            self._authenticator.start()
            self._authenticator.configure_curve_callback("*", credentials_provider=self)
            if on_denied is not None:
                self._guard = _Guard(self, on_denied)

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether a connecting client's public key is the cluster's. Called by the authenticator."""
        admitted = key == self._keys.client_public
        if not admitted and self._on_denied is not None:
            self._on_denied()
        return admitted

    def bind(self, address: str, port: int = 0) -> tuple[zmq.Socket[bytes], str]:
        """A bound ROUTER socket, and its endpoint.

        Args:
            address: a numeric address of this host, never a wildcard.
            port: 0 lets the system choose.

        Raises:
            zmq.ZMQError: the address is not this host's or the port is taken.
        """
        socket = self._socket(zmq.ROUTER, address)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        # A peer that reconnects after a cut link takes its name over from the dead connection.
        socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        if self._encrypt:
            socket.curve_server = True
            socket.curve_publickey = self._keys.server_public
            socket.curve_secretkey = self._keys.server_secret
        if self._guard is not None:
            self._guard.watch(socket)
        host = f"[{address}]" if ":" in address else address
        socket.bind(f"tcp://{host}:{port or '*'}")
        return socket, socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def connect(self, identity: str, endpoint: str) -> zmq.Socket[bytes]:
        """A DEALER socket that introduces itself as ``identity``. Connects in the background, and reconnects."""
        socket = self._socket(zmq.DEALER, endpoint.removeprefix("tcp://").rpartition(":")[0])
        socket.setsockopt(zmq.IDENTITY, identity.encode())
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        # The system itself asks less and less often, in the end every two minutes, whether a cut link is back.
        socket.setsockopt(zmq.CONNECT_TIMEOUT, int(HEARTBEAT_TIMEOUT_S * 1000))
        if self._encrypt:
            socket.curve_serverkey = self._keys.server_public
            socket.curve_publickey = self._keys.client_public
            socket.curve_secretkey = self._keys.client_secret
        socket.connect(endpoint)
        return socket

    def pair(self, name: str, *, bind: bool) -> zmq.Socket[bytes]:
        """One end of an in-process PAIR, to wake a polling thread."""
        socket = self._context.socket(zmq.PAIR)
        socket.setsockopt(zmq.LINGER, 0)
        if bind:
            socket.bind(f"inproc://{name}")
        else:
            socket.connect(f"inproc://{name}")
        return socket

    def derive_key(self, purpose: str) -> bytes:
        """32 bytes that all of the cluster's processes know and nobody else, different for each purpose."""
        return hashlib.blake2b(
            self._keys.server_secret + self._keys.client_secret, digest_size=32, person=purpose.encode()
        ).digest()

    def close(self) -> None:
        """Close all sockets without waiting for their queues. Idempotent."""
        if self._guard is not None:
            self._guard.close()
            self._guard = None
        if self._authenticator is not None:
            self._authenticator.stop()
            self._authenticator = None
        self._context.destroy(linger=0)

    def _socket(self, kind: int, address: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        socket.setsockopt(zmq.SNDHWM, QUEUED_MESSAGES)
        socket.setsockopt(zmq.RCVHWM, QUEUED_MESSAGES)
        socket.setsockopt(zmq.IPV6, int(":" in address))
        socket.setsockopt(zmq.HEARTBEAT_IVL, int(HEARTBEAT_INTERVAL_S * 1000))
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(HEARTBEAT_TIMEOUT_S * 1000))
        return socket


class _Guard:
    """Counts connections that fail before a key could be asked about, on a thread that sleeps until there is one."""

    _FAILED = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL

    def __init__(self, context: SecureContext, on_denied: Callable[[], None]) -> None:
        self._on_denied = on_denied
        self._lock = threading.Lock()
        self._handed_over: deque[zmq.Socket[bytes]] = deque()
        name = f"guard-{secrets.token_hex(8)}"
        self._wake_in = context.pair(name, bind=True)
        self._wake_out = context.pair(name, bind=False)
        self._thread = threading.Thread(target=self._run, name="guard", daemon=True)
        self._thread.start()

    def watch(self, socket: zmq.Socket[bytes]) -> None:
        """Watch a socket that is about to listen, until it is closed."""
        monitor = socket.get_monitor_socket(self._FAILED | zmq.EVENT_MONITOR_STOPPED)
        with self._lock:
            self._handed_over.append(monitor)
            self._wake_out.send(b"watch")

    def close(self) -> None:
        """End the thread."""
        with self._lock:
            self._wake_out.send(b"stop")
        self._thread.join()
        self._wake_out.close()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._wake_in, zmq.POLLIN)
        monitors: set[zmq.Socket[bytes]] = set()
        running = True
        while running:
            for ready, _ in poller.poll():
                if ready is self._wake_in:
                    running = self._wake_in.recv() != b"stop"
                    while self._handed_over:
                        monitor = self._handed_over.popleft()
                        monitors.add(monitor)
                        poller.register(monitor, zmq.POLLIN)
                elif recv_monitor_message(ready)["event"] & self._FAILED:
                    self._on_denied()
                else:  # its socket is closed
                    poller.unregister(ready)
                    monitors.remove(ready)
                    ready.close()
        for socket in (*monitors, self._wake_in):
            socket.close()
