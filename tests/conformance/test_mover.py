"""What the transports' conformance suite does not ask of a process that moves KV for another: order, and its death."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from support.moving import MovedTransport, MovingProcess
from support.patience import stretched
from tandem.core.errors import TransferError, WorkerError
from tandem.core.frames import send_frame
from tandem.kv_transfer.layout import Runs
from tandem.kv_transfer.memory import Buffer
from tandem.kv_transfer.transports import Read, Region
from tandem.kv_transfer.transports import mover_link as mover_link_module
from tandem.kv_transfer.transports.forwarded import forwarded
from tandem.kv_transfer.transports.mover_link import MoverLink
from tandem.kv_transfer.transports.mover_messages import BadFrame, Ended, Offer, Offers, PeerAdded, encode

PEER = "prefill-0#1"
SIZE = 4096


@pytest.fixture
def moving() -> Iterator[MovingProcess]:
    moving = MovingProcess()
    yield moving
    moving.close()


def whole() -> Runs:
    return Runs(np.zeros(1, np.int64), np.zeros(1, np.int64), np.full(1, SIZE, np.int64))


def connect(moving: MovingProcess, news: threading.Event, after: int) -> tuple[MovedTransport, MovedTransport, Buffer]:
    """(owner, reader, where the reader's bytes land); the reads wait for ``after`` copies."""
    owner, reader = moving.make("shm", lambda: None), moving.make("shm", news.set)
    source, target = Buffer(SIZE), Buffer(SIZE)
    source.array[:] = 7
    owner.register(Region("blocks", source))
    reader.register(Region("blocks", target))
    reader.after = after
    descriptor = owner.descriptor()
    reader.add_peer(PEER, descriptor)
    return owner, reader, target


def test_a_read_waits_for_the_blocks_that_were_to_be_copied_before_it(moving: MovingProcess) -> None:
    news = threading.Event()
    _, reader, target = connect(moving, news, after=2)
    number = reader.submit(Read(PEER, "blocks", "blocks", whole()))
    moving.copied(1)
    assert not news.wait(0.2)
    assert not target.array.any()
    moving.copied(2)
    assert news.wait(10)
    assert [(result.number, result.error) for result in reader.poll()] == [(number, "")]
    assert (target.array == 7).all()


def test_a_read_that_waits_can_be_cancelled(moving: MovingProcess) -> None:
    news = threading.Event()
    _, reader, target = connect(moving, news, after=1)
    number = reader.submit(Read(PEER, "blocks", "blocks", whole()))
    assert reader.cancel([number]) == {number}
    assert news.wait(10)
    assert [result.number for result in reader.poll()] == [number]
    news.clear()
    moving.copied(1)
    assert not news.wait(0.2)
    assert not target.array.any()


def test_the_death_of_the_process_ends_its_reads(moving: MovingProcess) -> None:
    news = threading.Event()
    _, reader, _ = connect(moving, news, after=1)
    number = reader.submit(Read(PEER, "blocks", "blocks", whole()))
    moving.process.kill()
    assert news.wait(10)
    assert [(result.number, result.error) for result in reader.poll()] == [(number, "the child has ended")]
    news.clear()
    late = reader.submit(Read(PEER, "blocks", "blocks", whole()))
    assert news.is_set()
    assert [(result.number, result.error) for result in reader.poll()] == [(late, "the child has ended")]
    assert reader.cancel([number, late]) == set()
    with pytest.raises(TransferError, match="the child has ended"):
        reader.add_peer(PEER, b"")
    reader.close()


class Silent:
    """The other end of a link, that says what a test lets it say."""

    def __init__(self) -> None:
        ours, self.theirs = socket.socketpair()
        self.news = threading.Event()
        self.refused: list[None] = []
        self.link = MoverLink(ours, "rank 1 of 2", self.news.set, on_bad_frame=lambda: self.refused.append(None))

    def say(self, *news: Offers | PeerAdded | Ended | BadFrame) -> None:
        for message in news:
            send_frame(self.theirs, encode(message))

    def close(self) -> None:
        self.link.close()
        self.theirs.close()


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Silent]:
    monkeypatch.setattr(mover_link_module, "_ANSWER_TIMEOUT_S", 0.2)
    monkeypatch.setattr(mover_link_module, "_OFFER_TIMEOUT_S", 0.2)
    silent = Silent()
    yield silent
    silent.close()


def test_nobody_waits_for_ever(silent: Silent) -> None:
    with pytest.raises(WorkerError, match="rank 1 of 2 offers no transports"):
        silent.link.offers()
    silent.say(Offers([Offer("shm", b"here", False, ["host"])]))
    transport = forwarded(silent.link)["shm"]
    assert (transport.name, transport.descriptor(), transport.converts) == ("shm", b"here", False)
    assert transport.memory == {"host"}
    with pytest.raises(TransferError, match="did not answer"):
        transport.add_peer(PEER, b"")
    # More than the socket holds: submitting does not wait for somebody who does not read.
    for _ in range(64):
        transport.submit(Read(PEER, "blocks", "blocks", Runs(*[np.zeros(1 << 14, np.int64)] * 3)))
    transport.close()


def test_who_offers_nothing_says_why(silent: Silent) -> None:
    silent.say(Offers([], "zmq: the address is another host's"))
    with pytest.raises(WorkerError, match="rank 1 of 2 offers no transports: zmq: the address"):
        forwarded(silent.link)


def test_refused_frames_are_counted_by_the_first_rank(silent: Silent) -> None:
    silent.say(BadFrame(), BadFrame(), Offers([]))
    silent.link.offers()
    assert len(silent.refused) == 2


def test_news_of_nothing_harm_nothing(silent: Silent) -> None:
    silent.say(Offers([Offer("shm", b"", False, ["host"])]))
    transport = forwarded(silent.link)["shm"]
    silent.say(Ended("shm", [(99, "")]), PeerAdded(98, "late"))
    number = transport.submit(Read(PEER, "blocks", "blocks", whole()))
    silent.say(Ended("shm", [(number, "no"), (number, "twice")]))
    results = []
    deadline_s = time.monotonic() + stretched(10)
    while not results:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
        results = transport.poll()
    assert [(result.number, result.error) for result in results] == [(number, "no")]
    assert transport.poll() == []


def test_what_is_no_message_ends_the_link(silent: Silent) -> None:
    silent.say(Offers([Offer("shm", b"", False, ["host"])]))
    transport = forwarded(silent.link)["shm"]
    number = transport.submit(Read(PEER, "blocks", "blocks", whole()))
    send_frame(silent.theirs, b"\xc1 nonsense")
    assert silent.news.wait(10)
    assert [(result.number, result.error) for result in transport.poll()] == [(number, "rank 1 of 2 has ended")]
