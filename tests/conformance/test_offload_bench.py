"""The benchmark of tiers measures what it says: its own checks hold, and its figures are whole."""

from __future__ import annotations

from pathlib import Path

from tandem.bench.offload import measure_disk, measure_lookup, measure_memory


def test_lookup() -> None:
    """Which keys are found, and where, is checked inside."""
    result = measure_lookup(2000)
    for name in ("host_ms", "three_ms", "dictionaries_ms"):
        assert 0 < result[name]["p0"] <= result[name]["p50"] <= result[name]["p99"]


def test_memory() -> None:
    result = measure_memory(32 << 20, 48 << 10)
    assert result["used_slots"] == result["slots"] > 600
    assert 0.95 < result["pool_share"] <= 1.05, "as much as was configured"


def test_disk(tmp_path: Path) -> None:
    result = measure_disk(tmp_path, 8 << 20, 64 << 10, 0.2, 2)
    [bare] = [key for key in result if key.startswith("load_") and key not in ("load_bytes_per_s", "load_share")]
    for key in ("store_bytes_per_s", "load_bytes_per_s", bare):
        assert len(result[key]) == 2
        assert min(result[key]) > 0
    assert not list(tmp_path.iterdir())
