"""Reads that carry no KV: which transport works between two places, how fast, and whether what landed is right."""

from __future__ import annotations

import msgspec
import pytest
from tandem.core.config import KVConfig
from tandem.core.wire import make_cluster_keys
from tandem.kv_transfer.transports import PREFERENCE
from tandem.kv_transfer.trial import BLOCK_BYTES, Offer, TrialEnd

SIZE = 64 * BLOCK_BYTES
KEYS = make_cluster_keys()


class Ends:
    def __init__(self, **kv: object) -> None:
        config = KVConfig.model_validate(kv)
        self.owner, self.reader = (
            TrialEnd(peer, KEYS, "127.0.0.1", config, SIZE) for peer in ("prefill-0#1", "decode-0#1")
        )
        self.offer = msgspec.msgpack.decode(msgspec.msgpack.encode(self.owner.offer()), type=Offer)

    def __enter__(self) -> Ends:
        return self

    def __exit__(self, *_: object) -> None:
        for end in (self.owner, self.reader):
            end.close()
            end.close()


def test_all_that_works_is_measured_and_checked() -> None:
    with Ends() as ends:
        why = ends.reader.connect(ends.offer)
        assert list(why) == [name for name in PREFERENCE if name in why], "in the order in which workers try"
        assert why["shm"] == why["zmq"] == ""
        assert ends.reader.refusal(ends.offer) == ""
        for name in ("shm", "zmq"):
            rate = ends.reader.measure(ends.offer, name, 5.0)
            assert rate.error == ""
            assert rate.num_bytes == SIZE
            assert rate.bytes_per_s > 0
        assert ends.reader.memory_rate().bytes_per_s > 0


def test_a_measurement_is_bounded_in_time() -> None:
    with Ends() as ends:
        ends.reader.connect(ends.offer)
        rate = ends.reader.measure(ends.offer, "shm", 0.0)
        assert rate.error == ""
        assert rate.num_bytes < SIZE


def test_wrong_bytes_are_told() -> None:
    with Ends() as ends:
        ends.reader.connect(ends.offer)
        ends.owner._blocks[3, 1000] = 77
        ends.owner._blocks[9, 0] = 10
        assert ends.reader.measure(ends.offer, "shm", 5.0).error == "2 of 64 blocks are wrong"


def test_an_owner_that_is_gone_is_an_error() -> None:
    with Ends() as ends:
        ends.reader.connect(ends.offer)
        ends.owner.close()
        assert "shm" in ends.reader.refusal(ends.offer) or ends.reader.connect(ends.offer)["shm"]
        assert ends.reader.measure(ends.offer, "zmq", 0.1).error


@pytest.mark.parametrize("choice", ["shm", "zmq"])
def test_what_the_configuration_leaves_out_says_so(choice: str) -> None:
    with Ends(transport=choice) as ends:
        why = ends.reader.connect(ends.offer)
        assert why[choice] == ""
        assert {reason for name, reason in why.items() if name in {"shm", "zmq"} - {choice}} == {
            f"kv.transport is {choice}"
        }


def test_what_require_rdma_leaves_out_says_so() -> None:
    with Ends(require_rdma=True) as ends:
        why = ends.reader.connect(ends.offer)
        assert why["shm"] == ""
        assert "kv.require_rdma rules out" in why["zmq"]
    with Ends(transport="zmq", require_rdma=True) as ends:
        assert ends.reader.refusal(ends.offer) == (
            "kv.transport zmq: nothing works: zmq: it would move KV by plain TCP, which kv.require_rdma rules out"
        )


def test_the_other_end_is_named_when_it_is_the_one_that_lacks_something() -> None:
    with Ends() as ends:
        poor = Offer("prefill-0#1", SIZE, {}, {"shm": "no memfd here"})
        why = ends.reader.connect(poor)
        assert why["shm"] == "prefill-0#1 does not offer it: no memfd here"
        assert why["zmq"] == "prefill-0#1 does not offer it: it does not know it"
