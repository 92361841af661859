"""Copies of blocks between addresses: both versions move what they are told, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from tandem.kernels import copy_blocks
from tandem.kv_transfer.offload.base import HostBlocks, SomeRows


@pytest.mark.parametrize("copy", [copy_blocks.reference, copy_blocks.native])
def test_blocks_arrive(copy: Callable[[np.ndarray, np.ndarray, int], None]) -> None:
    rng = np.random.default_rng(0)
    source, target = rng.integers(0, 256, (20, 101), dtype=np.uint8), np.zeros((30, 120), np.uint8)
    froms, tos = rng.permutation(20)[:12], rng.permutation(30)[:12]
    expected = target.copy()
    expected[tos, 7:108] = source[froms]
    copy(source.ctypes.data + froms * 101, target.ctypes.data + tos * 120 + 7, 101)
    np.testing.assert_array_equal(target, expected)


def test_host_blocks_keep_to_their_memory() -> None:
    rng = np.random.default_rng(1)
    blocks = HostBlocks(rng.integers(0, 256, 10 * 64, dtype=np.uint8), 64)
    rows = rng.integers(0, 256, (4, 80), dtype=np.uint8)
    before = blocks.array.copy()
    blocks.read([9, 0], SomeRows(rows[:, 8:72], np.array([3, 1])))
    np.testing.assert_array_equal(rows[[3, 1], 8:72], before[[9, 0]])
    blocks.write([2, 5], [rows[0, :64], rows[2, :64]])
    np.testing.assert_array_equal(blocks.array[[2, 5]], rows[[0, 2], :64])
    for wrong in ([10], [-1]):
        with pytest.raises(IndexError, match="of 10"):
            blocks.read(wrong, [rows[0, :64]])
    with pytest.raises(ValueError, match="2 sources, and 1 targets"):
        blocks.read([0, 1], [rows[0, :64]])
