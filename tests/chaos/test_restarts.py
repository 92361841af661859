"""Workers that die and come back under load: the others never restart, and hold nothing of the dead."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from support.footprint import Footprint
from support.gateway import wait_for
from support.load import Answer, Body, Tokens, ask_all, body, check
from support.patience import stretched
from support.processes import Processes

pytestmark = pytest.mark.chaos

Golden = Callable[[list[Body]], list[Tokens]]
NUM_BODIES = 40


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    config = {
        "kv": {"capacity": "48MiB", "poison_freed": True}, "routing": {"local_prefill": "never"},
        "pools": {"prefill": {"max_batched_tokens": 64}, "decode": {}},
    }  # fmt: skip
    workers: dict[str, dict[str, dict[str, object]]] = {"prefill-0": {}, "decode-0": {}, "decode-1": {}}
    with Processes(tmp_path_factory.mktemp("restarts"), config, workers) as cluster:
        yield cluster


class EndlessLoad:
    """Requests without a pause, until it is left; answers with the time of their sending."""

    def __init__(self, url: str, seed: int, at_once: int) -> None:
        self.answers: list[tuple[float, int, Answer]] = []
        self._sent: list[tuple[float, int]] = []
        self._url = url
        self._at_once = at_once
        self._numbers = itertools.count(seed % NUM_BODIES)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="load")

    def _requests(self) -> Iterator[Body]:
        for number in self._numbers:
            if self._over.is_set():
                return
            self._sent.append((time.monotonic(), number % NUM_BODIES))
            yield body(number % NUM_BODIES)

    def _run(self) -> None:
        answers = ask_all(self._url, self._requests(), self._at_once)
        self.answers = [(at_s, number, answer) for (at_s, number), answer in zip(self._sent, answers, strict=True)]

    def __enter__(self) -> EndlessLoad:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def wait_sent(self, count: int, since_s: float) -> None:
        """Until so many requests have been sent after ``since_s``."""
        wait_for(lambda: sum(at_s > since_s for at_s, _ in self._sent) >= count, 60, f"{count} requests")

    def more(self, count: int) -> None:
        """Wait until so many more are sent."""
        before = len(self._sent)
        wait_for(lambda: len(self._sent) >= before + count, 100, f"{count} requests")

    def check(self, golden: Golden, since_s: float) -> None:
        """All are right; of those sent after ``since_s``, 99 in 100 took less than 30 s on an idle machine."""
        wanted = golden([body(i) for i in range(NUM_BODIES)])
        check([answer for _, _, answer in self.answers], [wanted[number] for _, number, _ in self.answers])
        later = [answer.seconds for at_s, _, answer in self.answers if at_s > since_s]
        assert len(later) >= 50
        assert sum(seconds < stretched(30) for seconds in later) >= 0.99 * len(later), sorted(later)[-5:]


def test_prefill_comes_back_on_its_address(cluster: Processes, golden: Golden, seeds: Iterator[int]) -> None:
    for seed in seeds:
        cluster.serve()
        ask_all(cluster.url, [body(i) for i in range(8)])
        decoders = [cluster.all[name].system for name in ("decode-0", "decode-1")]
        footprint = Footprint(cluster, decoders)
        with EndlessLoad(cluster.url, seed, 10) as load:
            time.sleep(1.0)
            killed_s = time.monotonic()
            cluster.replace("prefill-0")
            cluster.wait_metric("tandem_prompt_tokens_total", 500, worker="prefill-0")
            load.wait_sent(60, killed_s)
        load.check(golden, killed_s)
        assert [cluster.all[name].system for name in ("decode-0", "decode-1")] == decoders
        footprint.check()


def test_decode_restarts_ten_times(cluster: Processes, golden: Golden, seeds: Iterator[int]) -> None:
    """Prefill lives through all of it, and keeps no block, lease, socket or mapping for a reader that is gone."""
    for seed in seeds:
        cluster.serve()
        ask_all(cluster.url, [body(i) for i in range(8)])
        prefill = cluster.all["prefill-0"]
        footprint = Footprint(cluster, [prefill.system])
        with EndlessLoad(cluster.url, seed, 4) as load:
            for turn in range(10):
                time.sleep(0.3)
                cluster.replace(f"decode-{turn % 2}")
            time.sleep(0.5)
            last_s = time.monotonic()
            load.wait_sent(60, last_s)
        load.check(golden, last_s)
        assert cluster.all["prefill-0"] is prefill
        assert prefill.alive
        footprint.check()


def test_decode_ends_three_times_and_hands_over(cluster: Processes, golden: Golden, seeds: Iterator[int]) -> None:
    """Whoever reads from a worker that ends keeps no socket, descriptor or mapping of it."""
    for seed in seeds:
        cluster.serve()
        ask_all(cluster.url, [body(i) for i in range(8)])
        stays = [cluster.all[name].system for name in ("prefill-0", "decode-0")]
        footprint = Footprint(cluster, stays)
        with EndlessLoad(cluster.url, seed, 10) as load:
            for _ in range(3):
                load.more(20)
                cluster.end("decode-1")
            last_s = time.monotonic()
            load.more(70)
        load.check(golden, last_s)
        assert "takes it over" in cluster.logs()
        assert [cluster.all[name].system for name in ("prefill-0", "decode-0")] == stays
        footprint.check()
