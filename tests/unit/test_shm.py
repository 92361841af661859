"""Shared memory: what is left of a peer that has gone."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
from support.gateway import wait_for
from tandem.kv_transfer.layout import Runs
from tandem.kv_transfer.memory import Buffer
from tandem.kv_transfer.transports import Read, Region
from tandem.kv_transfer.transports.shm import ShmTransport


def mappings(token: str) -> int:
    return Path("/proc/self/maps").read_text().count(f"tandem-{token}")


def test_nothing_of_a_peer_stays_after_the_last_read() -> None:
    """Also when no other read follows."""
    landed = threading.Event()
    theirs, ours = ShmTransport(lambda: None), ShmTransport(landed.set)
    source, target = Buffer(4096), Buffer(4096)
    assert source.shared is not None
    theirs.register(Region("kv", source))
    ours.register(Region("kv", target))
    source.array[:] = 7
    before = mappings(source.shared.token)
    ours.add_peer("prefill-0#1", theirs.descriptor())
    assert mappings(source.shared.token) == before + 1
    zero = np.zeros(1, np.int64)
    ours.submit(Read("prefill-0#1", "kv", "kv", Runs(zero, zero, zero + 4096)))
    assert landed.wait(30)
    assert [result.error for result in ours.poll()] == [""]
    assert (target.array == 7).all()
    ours.remove_peer("prefill-0#1")
    token = source.shared.token
    wait_for(lambda: mappings(token) == before, 10, "the mapping to go")
    ours.close()
    theirs.close()
    source.close()
    target.close()
