"""The benchmark of ranks that share experts runs; what it measures needs GPUs."""

from __future__ import annotations

import json

import pytest
from tandem.bench import experts
from tandem.core.errors import ConfigError
from tandem.kernels import on_gpu


@pytest.mark.skipif(not on_gpu.AVAILABLE, reason="Triton is not installed")
def test_exchanges_between_two_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"tokens": 3, "hidden": 48, "experts": 6, "top-k": 2, "programs": 3, "rounds": 1, "replays": 1}
    given = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    experts.main(["exchange", "--device", "cpu", "--ranks", "2", "--dtype", "float32", *given])
    header, *records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert header["bench"] == "experts exchange"
    assert [(record["operation"], record["by"]) for record in records] == [
        (operation, by)
        for operation in ("dispatch + combine", "dispatch", "combine")
        for by in ("peer memory", "all-to-all")
    ]
    assert all(0 < record["p50_us"] <= record["p99_us"] for record in records)


def test_too_few_gpus() -> None:
    with pytest.raises(ConfigError, match="99 ranks need a GPU each"):
        experts.main(["exchange", "--ranks", "99"])
