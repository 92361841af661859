"""Many hand-overs between two threads and their streams, with delays on both sides: each sees what it was given."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

import pytest
import torch
from tandem.kernels.events import CpuGpuEvent, EventClosed

GPU = torch.cuda.is_available()
COUNT = 1_000_000 if GPU else 10_000
SIZE = 4096


@pytest.mark.timeout(1200)
def test_what_is_handed_over_is_what_was_written() -> None:
    device = torch.device("cuda", 0) if GPU else torch.device("cpu")
    staged, consumed = CpuGpuEvent(device), CpuGpuEvent(device)
    buffer = torch.zeros(SIZE, dtype=torch.int32, device=device)
    expected = torch.zeros(1, dtype=torch.int32, device=device)
    wrong = torch.zeros(1, dtype=torch.int64, device=device)
    failures: list[BaseException] = []
    if GPU:
        torch.cuda.synchronize()

    def delay(chance: random.Random) -> None:
        if chance.random() < 0.01:
            time.sleep(chance.random() * 1e-4)
        if GPU and chance.random() < 0.1:
            torch.cuda._sleep(chance.randrange(20_000))

    def fill(stream: torch.cuda.Stream | None) -> None:
        chance = random.Random(1)
        for number in range(1, COUNT + 1):
            delay(chance)
            buffer.fill_(number)
            assert staged.record(stream) == number
            assert consumed.wait(stream, 60) == number

    def empty(stream: torch.cuda.Stream | None) -> None:
        chance = random.Random(2)
        for number in range(1, COUNT + 1):
            assert staged.wait(stream, 60) == number
            delay(chance)
            expected.add_(1)
            wrong.add_((buffer != expected).sum())
            assert consumed.record(stream) == number

    def run(loop: Callable[[torch.cuda.Stream | None], None]) -> None:
        try:
            if GPU:
                with torch.cuda.stream(torch.cuda.Stream(device)) as _:
                    loop(torch.cuda.current_stream(device))
            else:
                loop(None)
        except BaseException as error:  # noqa: BLE001
            failures.append(error)
            staged.close()
            consumed.close()

    threads = [threading.Thread(target=run, args=(loop,)) for loop in (fill, empty)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not [error for error in failures if not isinstance(error, EventClosed)], failures
    if GPU:
        torch.cuda.synchronize()
    assert int(expected) == COUNT
    assert int(wrong) == 0, f"{int(wrong)} numbers were not those of their hand-over"
