"""Keys of blocks, compiled, are those that hashlib makes."""

from __future__ import annotations

import random

import pytest
from tandem.cluster.prompt_hashes import PromptHashes
from tandem.core.hashing import block_hashes, root_hash
from tandem.kernels.block_hashes import chain

ROOT = root_hash("model", "tenant")


@pytest.mark.parametrize("block_tokens", [1, 2, 15, 16, 28, 30, 32, 58, 60, 62, 64, 92, 128, 256])
def test_keys(seed: int, block_tokens: int) -> None:
    """Blocks that fill one part of BLAKE2b's, a little more, several; one that ends in the middle; few and many."""
    rng = random.Random(seed)
    for num_blocks in (0, 1, 6, 7, 20):
        tokens = [rng.randrange(1 << 32) for _ in range(num_blocks * block_tokens + rng.randrange(block_tokens))]
        assert chain(tokens, block_tokens, ROOT) == b"".join(block_hashes(tokens, block_tokens, ROOT))


def test_a_prompts_keys_are_the_same_in_any_order(seed: int) -> None:
    rng = random.Random(seed)
    tokens = [rng.randrange(1 << 32) for _ in range(16 * 50 + 3)]
    keys = block_hashes(tokens, 16, ROOT)
    for _ in range(20):
        hashes = PromptHashes(tokens, 16, ROOT, 50)
        assert len(hashes) == 50
        for block in rng.sample(range(50), 5):
            assert hashes[block] == keys[block]
