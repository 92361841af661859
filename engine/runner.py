"""The device's side of the engine: computes steps that are plain data, and says when their tokens are there."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Several
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..core.errors import WorkerError
from ..core.messages import TokenLogprobs
from ..kernels.prefill_attention import Span, Spans
from .batch import Batch, GroupBlocks, StepInput
from .expert_parallel import StepSize
from .graphs import DecodeGraphs
from .models.decoder import Decoder
from .penalty_counts import PenaltyCounts
from .row_state import RowState
from .sampler import LogprobsOnTheWay, draw, prompt_logprobs
from .upload import download, upload

if TYPE_CHECKING:
    from .ranks import Ranks

_TABLE_ENTRIES: tuple[str, str] = "table_places", "table_blocks"


class Results:
    """What a step makes: on its way from the device until `wait` returns.

    Args:
        tokens: [draws] int64.
        step: that was computed.
        logits: [logits, vocabulary].
        started: recorded before the step, on a GPU.
        forward_s: time of the forward pass where the host has waited for it.
        states: [tokens, layers, hidden], of the tokens whose hidden states are wanted.

    Attributes:
        hidden_states: the same on the host; complete when `wait` has returned.
    """

    def __init__(
        self,
        tokens: Tensor,
        step: StepInput,
        logits: Tensor,
        started: torch.cuda.Event | None,
        forward_s: float,
        states: Tensor | None = None,
    ) -> None:
        self.forward_s = forward_s
        self.hidden_states = None if states is None else download(states)
        self._started = started
        self._tokens = download(tokens)
        self._logprobs: LogprobsOnTheWay | None = None
        if step.logprobs:
            draws = [index for index, _ in step.logprobs]
            chosen = step.arrays.get("draw_logits")
            rows = draws if chosen is None else chosen[draws].tolist()
            self._logprobs = LogprobsOnTheWay(logits[rows], tokens[draws], [num_top for _, num_top in step.logprobs])
        self._prompt_logprobs = prompt_logprobs(logits, step)
        self._ended: torch.cuda.Event | None = None
        if started is not None:
            self._ended = torch.cuda.Event(enable_timing=True)
            self._ended.record()

    def wait(self) -> tuple[list[int], list[TokenLogprobs], list[list[TokenLogprobs]]]:
        """Blocks until the device is done with the step.

        Returns:
            (tokens, log probabilities of the draws that asked, those of prompts).
        """
        if self._started is not None and self._ended is not None:
            self._ended.synchronize()
            self.forward_s = self._started.elapsed_time(self._ended) / 1e3
        logprobs = [] if self._logprobs is None else self._logprobs.get()
        return self._tokens.tolist(), logprobs, [part.get() for part in self._prompt_logprobs]


class _Kept:
    """Outputs of some layers, of some rows."""

    def __init__(self, layers: Several[int], ranges: Several[tuple[int, int]]) -> None:
        self._outputs: dict[int, Tensor | None] = dict.fromkeys(layers)
        self._ranges = ranges

    def look(self, layer: int, x: Tensor, residual: Tensor) -> None:
        if layer in self._outputs:
            self._outputs[layer] = torch.cat([x[start:stop] + residual[start:stop] for start, stop in self._ranges])

    def states(self) -> Tensor:
        return torch.stack([output for output in self._outputs.values() if output is not None], dim=1)


class Runner:
    """A model, its cache, and what the device keeps between steps. Owned by one thread.

    Args:
        model: with its weights.
        cache: of `KVLayout.shape`.
        layer_groups: first layer of each group of layers that is published as one.

    Attributes:
        state: of the sequences that decode, where the host runs ahead of the device.
        graphs: for decode steps on a GPU.
        ranks: that compute the same steps on their parts of the model; told here.
        kept_layers: whose outputs are kept for tokens whose hidden states are wanted.
    """

    def __init__(self, model: Decoder, cache: Tensor, layer_groups: Several[int]) -> None:
        self.model = model
        self.cache = cache
        self.layer_groups = layer_groups
        self.state: RowState | None = None
        self.graphs: DecodeGraphs | None = None
        self.ranks: Ranks | None = None
        self.kept_layers: tuple[int, ...] = ()
        self._counts = PenaltyCounts(model.spec.vocab_size, model.device)

    @torch.inference_mode()
    def run(self, step: StepInput, publish: Callable[[int], None] | None = None, *, eager: bool = False) -> Results:
        """Compute a step. On a GPU it returns when the work is queued, on a CPU when it is done.

        Args:
            step: what to compute; at least one token.
            publish: called with a layer group's number as soon as its KV is computed or queued.
            eager: without CUDA graphs; they do not stop to publish.

        Raises:
            WorkerError: a rank of several did not take part, or this one failed where others need it.
        """
        eager = eager or publish is not None or bool(step.hidden_states)
        if self.ranks is not None:
            self.ranks.compute(step, eager)
        experts = self.model.experts
        if experts is None:
            return self._run(step, publish, eager)
        num_tokens = len(step.arrays["tokens"])
        experts.agree(experts.work_of(num_tokens), num_tokens)
        try:
            return self._run(step, publish, eager)
        except RuntimeError as error:
            # The others are in the middle of the step that this rank has left, and cannot be met any more.
            raise WorkerError(f"a step of ranks that share experts failed: {error}") from error

    def serve(self) -> None:
        """Everything is ready: those who share experts now miss whoever is late. Blocks until all of them call it.

        Raises:
            WorkerError: a rank did not take part.
        """
        if self.model.experts is not None:
            if self.ranks is not None:
                self.ranks.serve()
            self.model.experts.serve()

    def accompany(self) -> bool:
        """Take part in the next step of the ranks that share experts, with no tokens. Blocks until all ranks are here.

        Returns:
            whether one of them had anything to compute.

        Raises:
            WorkerError: a rank did not take part.
        """
        experts = self.model.experts
        if experts is not None and self.ranks is not None:
            self.ranks.accompany()
        if experts is None or experts.agree(StepSize.NOTHING) is StepSize.NOTHING:
            return False
        if self.graphs is not None and self.graphs.recorded and experts.fixed:
            self.graphs.accompany(experts.rows)
        else:
            self.model.accompany()
        experts.check()
        return True

    def _run(self, step: StepInput, publish: Callable[[int], None] | None, eager: bool) -> Results:
        started = None
        if self.model.device.type == "cuda":
            started = torch.cuda.Event(enable_timing=True)
            started.record()
        start_s = time.perf_counter()
        states = None
        if self.graphs is not None and not eager and self._recorded(self.graphs, step):
            logits, tokens = self._replay(self.graphs, step)
            forward_s = time.perf_counter() - start_s
        else:
            tensors = upload(step.arrays, self.model.device)
            kept = _Kept(self.kept_layers, step.hidden_states) if step.hidden_states else None
            look = None if kept is None else kept.look
            logits = self.model.forward(self._batch(step, tensors), self.cache, self.layer_groups, publish, look)
            states = None if kept is None else kept.states()
            forward_s = time.perf_counter() - start_s
            tokens = self._draw(logits, step, tensors)
        return Results(tokens, step, logits, started, forward_s, states)

    def copy_block(self, source: int, target: int) -> None:
        """Copy a block's KV, after the steps so far."""
        if self.ranks is not None:
            self.ranks.copy_block(source, target)
        self.cache[target] = self.cache[source]

    def capture(self, progress: Callable[[float], None] = lambda done: None) -> None:
        """Record the CUDA graphs, if there are any. Blocks for some seconds.

        Args:
            progress: told the share that is done.
        """
        if self.ranks is not None:
            self.ranks.capture()
        if self.graphs is not None:
            self.graphs.capture(progress)

    def _recorded(self, graphs: DecodeGraphs, step: StepInput) -> bool:
        """Whether a graph runs a step."""
        experts = self.model.experts
        return graphs.serves(step) and (experts is None or (experts.fixed and graphs.recorded))

    def _replay(self, graphs: DecodeGraphs, step: StepInput) -> tuple[Tensor, Tensor]:
        assert self.state is not None
        if "table_places" in step.arrays:
            new = upload({name: step.arrays[name] for name in _TABLE_ENTRIES}, self.model.device)
            self.state.enter(*new.values())
        experts = self.model.experts
        inputs, logits, tokens = graphs.run(step, 0 if experts is None else experts.rows)
        if step.adjusted:
            tokens = self._draw(logits, step, upload(step.arrays, self.model.device) | {"tokens": inputs})
        return logits, tokens

    def _batch(self, step: StepInput, tensors: Mapping[str, Tensor]) -> Batch:
        single = step.num_single
        if self.state is not None:
            if "table_places" in tensors:
                self.state.enter(*(tensors[name] for name in _TABLE_ENTRIES))
            tokens, positions, slots = (tensors[name][..., :single] for name in ("tokens", "positions", "slots"))
            self.state.complete(tokens, positions, slots, tensors["rows"])
            block_tables, context_lens = self.state.block_tables[:, :single], self.state.context_lens[:single]
        else:
            block_tables, context_lens = tensors["block_tables"], tensors["context_lens"]
        num_groups = len(tensors["slots"])
        spans: list[Spans | None] = [None] * num_groups
        if "span_table" in tensors:
            rows = step.arrays["span_table"].tolist()
            spans = [_spans(rows, tensors["span_table"], blocks) for blocks in tensors["span_blocks"]]
        groups = [GroupBlocks(*parts) for parts in zip(tensors["slots"], block_tables, spans, strict=True)]
        return Batch(
            tokens=tensors["tokens"],
            positions=tensors["positions"],
            num_single=single,
            context_lens=context_lens,
            groups=tuple(groups),
            logit_rows=tensors["logit_rows"],
        )

    def _draw(self, logits: Tensor, step: StepInput, tensors: Mapping[str, Tensor]) -> Tensor:
        tokens = logits.new_empty(0, dtype=torch.int64)
        if step.num_draws:
            tokens = draw(logits, step, tensors, self._counts, self.model.ops)
            if self.state is not None:
                self.state.keep(tensors["draw_rows"], tokens)
        return tokens


def _spans(rows: list[list[int]], table: Tensor, blocks: Tensor) -> Spans:
    """The spans of a step in one KV group's blocks."""
    ends = [row[3] for row in rows[1:]] + [len(blocks)]
    each = [
        Span(start, start + count, blocks[first:end], context)
        for (start, count, context, first), end in zip(rows, ends, strict=True)
    ]
    return Spans(each, table, blocks)
