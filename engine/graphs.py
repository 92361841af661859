"""Decode steps as CUDA graphs: one launch instead of hundreds."""

from __future__ import annotations

import bisect
from collections.abc import Callable

import torch
from torch import Tensor

from .batch import Batch
from .models.decoder import Decoder


def ladder(max_rows: int) -> list[int]:
    """Batch sizes that get a graph: a batch runs in the next larger one."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, max_rows, 16)]
    return [*(size for size in sizes if size < max_rows), max_rows]


class DecodeGraphs:
    """Runs batches of one new token a sequence. Owned by the engine thread, as all that touches the GPU.

    Rows that fill a batch up to its graph's size have an empty context and no slot: they read and write nothing.

    Args:
        model: on a GPU, with operations that never wait for the device.
        cache: [blocks, layers, 2, kv_heads, block_tokens, head_dim].
        max_rows: of the largest batch.
        max_blocks: of the longest context.
    """

    def __init__(self, model: Decoder, cache: Tensor, max_rows: int, max_blocks: int) -> None:
        def make(*shape: int, fill: int = 0) -> Tensor:
            return torch.full(shape, fill, dtype=torch.int64, device=model.device)

        self._model = model
        self._cache = cache
        self._sizes = ladder(max_rows)
        self._static = Batch(
            tokens=make(max_rows),
            positions=make(max_rows),
            slots=make(max_rows, fill=-1),
            num_single=max_rows,
            block_tables=make(max_rows, max_blocks),
            context_lens=make(max_rows),
            spans=[],
            logit_rows=torch.arange(max_rows, device=model.device),
        )
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def serves(self, batch: Batch) -> bool:
        """Whether a batch is one that a graph can run: single tokens, each of whose logits are wanted."""
        return not batch.spans and batch.num_single <= self._sizes[-1] and len(batch.logit_rows) == batch.num_single

    def capture(self, progress: Callable[[float], None] = lambda done: None) -> None:
        """Record all graphs. Blocks for some seconds.

        Args:
            progress: told the share that is done.
        """
        # The largest first: the smaller ones find room in its memory.
        for done, size in enumerate(reversed(self._sizes)):
            self._capture(size)
            progress((done + 1) / len(self._sizes))

    @torch.inference_mode()
    def run(self, batch: Batch) -> Tensor:
        """Compute a batch, writing its KV.

        Args:
            batch: one that `serves` accepts.

        Returns:
            logits [rows, vocabulary], overwritten by the next run.
        """
        rows = batch.num_single
        size = self._sizes[bisect.bisect_left(self._sizes, rows)]
        if size not in self._graphs:
            self._capture(size)
        static = self._static
        static.tokens[:rows].copy_(batch.tokens)
        static.positions[:rows].copy_(batch.positions)
        static.slots[:rows].copy_(batch.slots)
        static.context_lens[:rows].copy_(batch.context_lens)
        static.block_tables[:rows, : batch.block_tables.shape[1]].copy_(batch.block_tables)
        if rows < size:
            static.slots[rows:size].fill_(-1)
            static.context_lens[rows:size].zero_()
        graph, logits = self._graphs[size]
        graph.replay()
        return logits[:rows]

    @torch.inference_mode()
    def _capture(self, size: int) -> None:
        static = self._static
        static.slots.fill_(-1)
        static.context_lens.zero_()
        part = Batch(
            tokens=static.tokens[:size],
            positions=static.positions[:size],
            slots=static.slots[:size],
            num_single=size,
            block_tables=static.block_tables[:size],
            context_lens=static.context_lens[:size],
            spans=[],
            logit_rows=static.logit_rows[:size],
        )
        # Kernels are compiled, and libraries take their workspaces, outside the recording.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._model.forward(part, self._cache)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._model.forward(part, self._cache)
        self._graphs[size] = graph, logits
