"""Decode steps as CUDA graphs: one copy and one launch instead of hundreds of launches, sampling included."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .batch import Batch, GroupBlocks, StepInput, ladder
from .models.decoder import Decoder
from .row_state import RowState
from .sampler import sampling_rows
from .upload import send

_INPUTS: dict[str, tuple[type, float]] = {
    "tokens": (np.int64, 0),
    "positions": (np.int64, 0),
    "slots": (np.int64, -1),
    "rows": (np.int64, 0),
    "top_k": (np.int64, 0),
    "seed": (np.int64, 0),
    "draw_positions": (np.int64, 0),
    "temperature": (np.float32, 0),
    "top_p": (np.float32, 1),
    "min_p": (np.float32, 0),
}
"""A graph's arrays, in the order in which they lie in memory, and what fills them up: of a number a row, but for the
slots, of which there are as many as KV groups."""


class _Recorded(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: Tensor
    """[rows] int64, the tokens that are computed."""
    logits: Tensor
    sampled: Tensor


class DecodeGraphs:
    """Runs steps of one new token a sequence. Owned by the engine thread, as all that touches the GPU.

    Rows that fill a batch up to its graph's size have an empty context and no slot: they read and write nothing, but
    for the state's spare row.

    Args:
        model: on a GPU, with operations that never wait for the device.
        cache: of `KVLayout.shape`.
        state: of the sequences.
        max_rows: of the largest batch.
        spare_row: of the state.
    """

    def __init__(self, model: Decoder, cache: Tensor, state: RowState, max_rows: int, spare_row: int) -> None:
        self._model = model
        self._cache = cache
        self._state = state
        self._sizes = ladder(max_rows)
        self._spare_row = spare_row
        self._num_groups = len(model.groups)
        self._static = torch.zeros(self._num_words(max_rows), dtype=torch.int64, device=model.device)
        self._graphs: dict[int, _Recorded] = {}
        self._pool = torch.cuda.graph_pool_handle()
        # Torch's own is of the device that recorded first in the process.
        self._stream = torch.cuda.Stream(model.device)

    def serves(self, step: StepInput) -> bool:
        """Whether a graph can run a step: single tokens, each drawn from once."""
        return step.decodes and step.num_single <= self._sizes[-1]

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
    def run(self, step: StepInput, agreed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Queue a step, writing its KV and keeping its tokens.

        Args:
            step: one that `serves` accepts; penalties and biases are left out.
            agreed: rows of the graph, on which ranks that share experts have agreed; 0: as many as the step needs.

        Returns:
            (input tokens [rows], logits [rows, vocabulary], sampled tokens [rows]), overwritten by the next run.
        """
        rows = step.num_single
        size = agreed or self._sizes[bisect.bisect_left(self._sizes, rows)]
        if size not in self._graphs:
            assert not agreed, "ranks that share experts record their graphs together, before they serve"
            self._capture(size)
        recorded = self._graphs[size]
        self._send(step, size)
        recorded.graph.replay()
        return recorded.inputs[:rows], recorded.logits[:rows], recorded.sampled[:rows]

    def accompany(self, agreed: int) -> None:
        """Queue a step without tokens, as ranks that share experts have agreed on its rows."""
        self._send(None, agreed)
        self._graphs[agreed].graph.replay()

    @property
    def recorded(self) -> bool:
        """Whether there is a graph of every size."""
        return len(self._graphs) == len(self._sizes)

    def _send(self, step: StepInput | None, size: int) -> None:
        """Copy a step's arrays, or rows that only fill up, to where the graph of ``size`` looks for them."""
        rows = 0 if step is None else step.num_single
        words = self._num_words(size)
        pinned = torch.empty(words, dtype=torch.int64, pin_memory=True)
        buffer = pinned.numpy()
        for name, (start, stop, dtype) in self._places(size).items():
            place: np.ndarray = buffer[start:stop].view(dtype)
            if name == "slots":
                place = place.reshape(self._num_groups, size)
            if step is not None:
                place[..., :rows] = step.arrays[name]
            place[..., rows:] = self._spare_row if name == "rows" else _INPUTS[name][1]
        send(pinned, self._static[:words])

    @torch.inference_mode()
    def _capture(self, size: int) -> None:
        tensors = {
            name: self._static[start:stop].view(torch.float32 if dtype is np.float32 else torch.int64)[:size]
            for name, (start, stop, dtype) in self._places(size).items()
            if name != "slots"
        }
        start, stop, _ = self._places(size)["slots"]
        tensors["slots"] = self._static[start:stop].view(self._num_groups, size)
        self._send(None, size)
        # Kernels are compiled, and libraries take their workspaces, outside the recording. Not on a stream of its own:
        # each would get memory and a workspace that no other stream uses.
        self._compute(tensors, size)
        torch.cuda.synchronize(self._model.device)
        graph = torch.cuda.CUDAGraph()
        # NCCL's watchdog asks for the state of events meanwhile, in a thread of its own.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            logits, sampled = self._compute(tensors, size)
        self._graphs[size] = _Recorded(graph, tensors["tokens"], _borrowed(logits), sampled)

    def _compute(self, tensors: dict[str, Tensor], size: int) -> tuple[Tensor, Tensor]:
        state = self._state
        state.complete(tensors["tokens"], tensors["positions"], tensors["slots"], tensors["rows"])
        batch = Batch(
            tokens=tensors["tokens"],
            positions=tensors["positions"],
            num_single=size,
            context_lens=state.context_lens[:size],
            groups=tuple(
                GroupBlocks(slots, tables[:size], None)
                for slots, tables in zip(tensors["slots"], state.block_tables, strict=True)
            ),
            logit_rows=None,
        )
        if self._model.experts is not None:
            self._model.experts.record(size, tensors["slots"][0])
        logits = self._model.forward(batch, self._cache)
        sampled = self._model.ops.sample(logits, sampling_rows(tensors))
        state.keep(tensors["rows"], sampled)
        return logits, sampled

    def _places(self, size: int) -> dict[str, tuple[int, int, type]]:
        """First and last word of each array for ``size`` rows."""
        places = {}
        at = 0
        for name, (dtype, _) in _INPUTS.items():
            words = size if dtype is np.int64 else -(-size // 2)
            words *= self._num_groups if name == "slots" else 1
            places[name] = at, at + words, dtype
            at += words
        return places

    def _num_words(self, size: int) -> int:
        return max(stop for _, stop, _ in self._places(size).values())


class _Memory:
    """Some bytes of a GPU, see https://nvidia.github.io/numba-cuda/user/cuda_array_interface.html."""

    def __init__(self, tensor: Tensor) -> None:
        num_bytes = tensor.numel() * tensor.element_size()
        place = {"shape": (num_bytes,), "typestr": "|u1", "data": (tensor.data_ptr(), False), "version": 3}
        self.__cuda_array_interface__ = place


def _borrowed(tensor: Tensor) -> Tensor:
    """The same memory, not owned: other graphs of the pool may use it too. Logits of every graph's own, of 150,000
    entries and up to 256 rows, would take 700 MB."""
    return torch.as_tensor(_Memory(tensor), device=tensor.device).view(tensor.dtype).view(tensor.shape)
