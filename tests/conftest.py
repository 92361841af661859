"""What all tests share."""

from __future__ import annotations

import multiprocessing.util
import os
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# Triton reads this when a kernel is declared: without a GPU its interpreter runs them.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# `support` is imported by its own name: the tests are not part of the package.
sys.path.insert(0, str(Path(__file__).parent))

from support.interpreter import hasten

hasten()

# Torch's threads wait for each other; with small tensors, and other processes on the cores, that is all they do.
torch.set_num_threads(1)

settings.register_profile(
    "tandem", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
settings.load_profile("tandem")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ucx", action="store_true", help="run tests of UCX in this process, which UCX may end")
    parser.addoption(
        "--soak",
        type=float,
        default=0.0,
        metavar="MINUTES",
        help="run the soak tests, and repeat each chaos test with random seeds, for so long",
    )
    parser.addoption("--seed", type=int, help="what random inputs are made of, instead of the test's name")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--ucx"):
        skip = pytest.mark.skip(reason="UCX may end the process: test_ucx.py runs it in another")
        for item in items:
            if "ucx" in item.keywords:
                item.add_marker(skip)
    minutes = config.getoption("--soak")
    for item in items:
        if minutes and "soak_minutes" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(60 * minutes + 600))
    if not minutes:
        skip = pytest.mark.skip(reason="a soak; run it with --soak MINUTES")
        for item in items:
            if "soak" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What this process's runs leave behind is not what those of another do, beside it. Ray's sockets live in this
    folder, and their paths must be short."""
    # These stay where they always were; the second is removed at the very end.
    tmp_path_factory.getbasetemp()
    multiprocessing.util.get_temp_dir()
    folder = tempfile.mkdtemp(prefix="t")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", folder)
        yield
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def compiled_kernels() -> None:
    """What a worker of the demo model would compile at its first start is compiled, once for all processes of tests."""
    command = "from support.warm_up import main; main()"
    folders = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    subprocess.run(
        [sys.executable, "-c", command], env=os.environ | {"PYTHONPATH": os.pathsep.join(folders)}, check=True
    )


@pytest.fixture(scope="session")
def soak_minutes(request: pytest.FixtureRequest) -> float:
    """How long soak tests run."""
    return float(request.config.getoption("--soak"))


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """What random inputs are made of: on a CPU the test's name, so that a test which passed fails by a change alone;
    on a GPU, and in a soak, every run sees others. A failure prints it, for ``--seed``."""
    seed = request.config.getoption("--seed")
    if seed is None:
        fresh = torch.cuda.is_available() or request.config.getoption("--soak")
        seed = torch.seed() % 2**31 if fresh else zlib.crc32(request.node.nodeid.encode()) % 2**31
    print("seed", seed)
    return int(seed)


@pytest.fixture
def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
