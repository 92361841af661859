"""The memory of the KV blocks, as the engine's tensor and as the transports' region."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..core.errors import ConfigError
from ..core.units import format_bytes
from ..kv_transfer.layout import KVLayout
from ..kv_transfer.memory import Buffer, DeviceBuffer

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Of weights and activations."""
KV_DTYPES = {**TORCH_DTYPES, "fp8_e4m3": torch.float8_e4m3fn}


class KVCache:
    """A cache of ``num_blocks`` blocks, in memory that peers can map. On a GPU it starts with any content.

    Attributes:
        tensor: `KVLayout.shape` elements of the layout's dtype.
        blocks: the same bytes.
        generations: [num_blocks] uint64, in the host's memory.

    Raises:
        ConfigError: the GPU's memory cannot be shared.
        torch.OutOfMemoryError: it is not enough.
    """

    def __init__(self, layout: KVLayout, num_blocks: int, device: torch.device) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.generations_buffer = Buffer(num_blocks * 8)
        self.generations: np.ndarray = self.generations_buffer.array.view(np.uint64)
        dtype, shape = KV_DTYPES[layout.dtype], layout.shape(num_blocks)
        num_bytes = num_blocks * layout.block_bytes
        self.blocks: Buffer | DeviceBuffer
        if device.type == "cpu":
            self.blocks = Buffer(num_bytes)
            flat = torch.from_numpy(self.blocks.array)
        else:
            self.blocks = DeviceBuffer(num_bytes, torch.cuda.current_device() if device.index is None else device.index)
            flat = self.blocks.tensor()
        self.tensor = flat.view(dtype).view(shape)

    def poison(self, blocks: Sequence[int]) -> None:
        """Fill blocks with what is no number: whatever still uses what they held will show it."""
        self.tensor[torch.tensor(blocks, dtype=torch.int64, device=self.tensor.device)] = float("nan")

    def close(self) -> None:
        """Let the memory go when its last user does."""
        self.blocks.close()
        self.generations_buffer.close()


def plan_num_blocks(
    layout: KVLayout, per_sequence: int, capacity: int | str, max_running: int, max_model_len: int, available: int
) -> int:
    """How many blocks a worker gets.

    Args:
        layout: of a block.
        per_sequence: blocks that the longest sequence needs, see `allocator.num_blocks_needed`.
        capacity: bytes, or "auto".
        max_running: sequences at a time.
        max_model_len: tokens of the longest.
        available: bytes that "auto" may take.

    Raises:
        ConfigError: not even one sequence of ``max_model_len`` fits.
    """
    if isinstance(capacity, str):
        blocks = min(max_running * per_sequence, available // layout.block_bytes)
    else:
        available = capacity
        blocks = capacity // layout.block_bytes
    if blocks < per_sequence:
        raise ConfigError(
            f"kv.capacity: {format_bytes(available)} hold {max(blocks, 0)} blocks of {layout.block_tokens} tokens; "
            f"one sequence of model.max_model_len = {max_model_len} tokens needs "
            f"{per_sequence}, {format_bytes(per_sequence * layout.block_bytes)}",
            fix="raise kv.capacity or lower model.max_model_len",
        )
    return int(blocks)
