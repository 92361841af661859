"""One served demo model for all tests that only look."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.served import Served


@pytest.fixture(scope="session", autouse=True)
def first_start(compiled_kernels: None) -> None:
    """No worker of a test is the first on this host."""


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("served"))
    try:
        served.wait_ready()
        yield served
        assert served.stop() == 0, served.text()
    finally:
        served.kill()
