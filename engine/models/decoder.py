"""The forward pass of all supported families: one decoder, whose spec says which parts it has."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...kernels.decode_layers import MAX_WEIGHTS, LayerWeights, Prepared, Rows, num_weights
from ...kernels.oracle import Ops
from ...kernels.rotary import HeadNorm
from ...kernels.schemes.packed import Packed
from ...kv_transfer.layout import group_layers
from ..batch import Batch, GroupBlocks
from ..expert_parallel import ExpertGroup
from ..tensor_parallel import Alone, Group
from .experts import Experts
from .latent_attention import LatentAttention
from .mlp import Mlp
from .parameters import Parameters
from .rope import cos_sin_table
from .shard import padded_rows, shard, vocabulary_rows
from .spec import ModelSpec


class Layer:
    """Attention and the feed-forward part, each after a norm and, among several ranks, before a sum over them.

    Args:
        spec: this rank's part of the model's.
        index: which layer.
        make: makes uninitialised parameters.
        group: the ranks that share the layer.
        kv_group: which blocks hold its KV.
        place: where in a block.
        experts: the ranks that have different experts of it, if there are several.
    """

    def __init__(
        self,
        spec: ModelSpec,
        index: int,
        make: Parameters,
        group: Group,
        kv_group: int,
        place: int,
        experts: ExpertGroup | None,
    ) -> None:
        prefix = f"model.layers.{index}."
        self.index = index
        self.kv_group = kv_group
        self.place = place
        self.window = spec.windows[index]
        self.eps = spec.norm_eps
        self.input_norm = make(spec.hidden)
        self.latent: LatentAttention | None = None
        if spec.latent is None:
            self._make_attention(spec, make, group.rank, prefix + "self_attn.")
        else:
            self.latent = LatentAttention(spec, index, make, group.rank, kv_group, place)
        self.post_norm = make(spec.hidden)
        self.mlp: Mlp | Experts
        if index in spec.moe_layers:
            self.mlp = Experts(spec, make, group.rank, index, experts)
        else:
            self.mlp = Mlp(spec.hidden, spec.inner, make, spec.mlp_bias, group.rank, prefix + "mlp.")
        self._group = group

    def _make_attention(self, spec: ModelSpec, make: Parameters, rank: int, attention: str) -> None:
        heads, kv_heads, head_dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
        rows = [heads * head_dim, *[kv_heads * head_dim] * 2]
        self.scale = head_dim**-0.5
        self.qkv = make.matrix(attention, ("q_proj", "k_proj", "v_proj"), rows, spec.hidden)
        self.qkv_bias = make(sum(rows)) if spec.qkv_bias else None
        self.head_norm = HeadNorm(make(head_dim), make(head_dim), spec.norm_eps) if spec.qk_norm else None
        self.o = make.matrix(attention, ("o_proj",), [spec.hidden], heads * head_dim, cut_columns=True)
        self.o_bias = make(spec.hidden) if spec.o_bias else None
        self.sinks = make(heads) if spec.sinks else None
        self._added_bias = self.o_bias if rank == 0 else None

    def weights(self) -> LayerWeights | None:
        """What `kernels.decode_layers` computes with; None for a layer that it does not cover."""
        mlp = self.mlp
        if self.latent is not None or self.sinks is not None or (isinstance(mlp, Mlp) and mlp.gate_up_bias is not None):
            return None
        feed = mlp.weights if isinstance(mlp, Experts) else mlp
        qkv, o, gate_up, down = self.qkv, self.o, feed.gate_up, feed.down
        if isinstance(qkv, Packed) or isinstance(o, Packed) or isinstance(gate_up, Packed) or isinstance(down, Packed):
            return None
        moe = mlp.spec if isinstance(mlp, Experts) else None
        return LayerWeights(
            input_norm=self.input_norm,
            qkv=qkv,
            qkv_bias=self.qkv_bias,
            head_norm=self.head_norm,
            o=o,
            o_bias=self.o_bias,
            post_norm=self.post_norm,
            router=mlp.router if isinstance(mlp, Experts) else None,
            gate_up=gate_up if moe else gate_up.unsqueeze(0),
            down=down if moe else down.unsqueeze(0),
            top_k=moe.top_k if moe else 0,
            renormalize=moe.renormalize if moe else False,
            eps=self.eps,
            scale=self.scale,
            window=self.window,
            group=self.kv_group,
            place=self.place,
        )

    def __call__(
        self, x: Tensor, residual: Tensor | None, batch: Batch, cache: Tensor, cos_sin: Tensor, ops: Ops
    ) -> tuple[Tensor, Tensor]:
        x, residual = ops.rms_norm(x, residual, self.input_norm, self.eps)
        if self.latent is not None:
            x = self.latent(x, batch, cache, cos_sin, ops)
        else:
            qkv = ops.multiply(x, self.qkv, self.qkv_bias)
            own = batch.groups[self.kv_group]
            rotated = ops.rotary(qkv, self.head_norm, cos_sin, batch.positions, cache, self.place, own.slots)
            x = ops.multiply(self._attend(*rotated, batch, own, cache, ops).flatten(1), self.o, self._added_bias)
        x, residual = ops.rms_norm(self._group.all_reduce(x), residual, self.post_norm, self.eps)
        return self._group.all_reduce(self.mlp(x, ops)), residual

    def _attend(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, batch: Batch, own: GroupBlocks, cache: Tensor, ops: Ops
    ) -> Tensor:
        single = batch.num_single
        tables, lengths = own.block_tables, batch.context_lens
        how = self.scale, self.window, self.sinks
        if own.spans is None:
            return ops.decode_attention(q, cache, self.place, tables, lengths, *how)
        out = ops.prefill_attention(q, k, v, cache, self.place, own.spans, *how)
        if single:
            out[:single] = ops.decode_attention(q[:single], cache, self.place, tables, lengths, *how)
        return out


class Decoder:
    """A whole model, or one rank's part of it. Its tensors are uninitialised until `engine.weights` has filled them.

    Attributes:
        spec: of the whole model.
        local: of this rank's layers.
        groups: layers whose KV lies in the same blocks.

    Args:
        spec: what to build.
        max_model_len: longest sequence.
        dtype: of weights and activations.
        device: where.
        ops: the kernels to run on.
        matrix_dtype: of the weights that multiply, where ``ops`` takes them in another type.
        group: the ranks that share the model.
        experts: the ranks that have different experts of it, if there are several: this group's, and others with
            requests of their own.

    Raises:
        ConfigError: the model, or its quantised weights, cannot be divided among so many.
    """

    def __init__(
        self,
        spec: ModelSpec,
        max_model_len: int,
        dtype: torch.dtype,
        device: torch.device,
        ops: Ops,
        matrix_dtype: torch.dtype | None = None,
        group: Group = Alone(),
        experts: ExpertGroup | None = None,
    ) -> None:
        make = Parameters(dtype, matrix_dtype or dtype, device, spec.quantization, group.size)
        self.spec = spec
        self.dtype = dtype
        self.device = device
        self.ops = ops
        self.group = group
        self.experts = experts
        self.local = shard(spec, group.size, whole_experts=experts is not None)
        # Every rank gathers equally many logits; rows beyond the vocabulary fill the last ranks up.
        rows = padded_rows(spec, group.size)
        if spec.tied_embeddings:
            padded = make(group.size * rows, spec.hidden)
            self.embedding = padded[: spec.vocab_size]
            self.head = padded[group.rank * rows : (group.rank + 1) * rows]
        else:
            self.embedding = make(spec.vocab_size, spec.hidden)
            self.head = make(rows, spec.hidden)
        self.head[len(vocabulary_rows(spec, group.rank, group.size)) :].zero_()
        self.groups = group_layers(spec.windows)
        places = {layer: (n, place) for n, kv in enumerate(self.groups) for place, layer in enumerate(kv.layers)}
        self.layers = [
            Layer(self.local, index, make, group, *places[index], experts) for index in range(spec.num_layers)
        ]
        if experts is not None and experts.movable and device.type != "meta":
            mixtures = [layer.mlp for layer in self.layers if isinstance(layer.mlp, Experts)]
            for mlp, weights in zip(mixtures, experts.house([mlp.weights for mlp in mixtures]), strict=True):
                mlp.weights = weights
        self.norm = make(spec.hidden)
        table = cos_sin_table(spec.rope, spec.rope_dim, max_model_len, spec.max_positions)
        self._cos_sin = table.to(device)
        self._decode_layers = self._prepare()

    def _run_layers(
        self,
        x: Tensor,
        batch: Batch,
        cache: Tensor,
        done: Callable[[int], None],
        look: Callable[[int, Tensor, Tensor], None] | None,
    ) -> tuple[Tensor, Tensor]:
        at_once = batch.groups[0].spans is None and look is None
        if at_once and self._decode_layers and self.ops.decode_layers is not None:
            rows = [Rows(batch.positions, own.slots, own.block_tables, batch.context_lens) for own in batch.groups]
            return self.ops.decode_layers(x, self._decode_layers, rows, cache, self._cos_sin, done)
        residual: Tensor | None = None
        for layer in self.layers:
            x, residual = layer(x, residual, batch, cache, self._cos_sin, self.ops)
            if look is not None:
                look(layer.index, x, residual)
            done(layer.index)
        assert residual is not None
        return x, residual

    def _prepare(self) -> list[Prepared]:
        """The layers for `kernels.decode_layers`, where it serves all of them: it takes no sums over ranks."""
        whole = self.ops.decode_layers is not None and self.group.size == 1
        whole = whole and not (self.spec.moe_layers and self.ops.moe.form != "monolithic")
        weights = [layer.weights() for layer in self.layers] if whole else []
        covered = [w for w in weights if w is not None and num_weights(w) <= MAX_WEIGHTS]
        return [Prepared(w) for w in covered] if len(covered) == len(self.layers) else []

    def absorb(self) -> None:
        """Make of weights that have just been loaded what steps compute with, where that differs."""
        for layer in self.layers:
            if layer.latent is not None:
                layer.latent.absorb(self.dtype)

    @torch.inference_mode()
    def forward(
        self,
        batch: Batch,
        cache: Tensor,
        groups: Sequence[int] = (),
        publish: Callable[[int], None] | None = None,
        look: Callable[[int, Tensor, Tensor], None] | None = None,
    ) -> Tensor:
        """Compute a batch, writing its KV.

        Args:
            batch: the tokens.
            cache: of `KVLayout.shape`; of this rank's heads.
            groups: first layer of each layer group.
            publish: called with a layer group's number when its layers' KV is in the cache.
            look: called after each layer with its number and two tensors [tokens, hidden] that are overwritten later,
                whose sum is the layer's output.

        Returns:
            logits [wanted rows, vocabulary], in the model's dtype; the same on all ranks.

        Raises:
            WorkerError: another rank did not take part.
        """
        ends = {end - 1: group for group, end in enumerate((*groups[1:], len(self.layers)))}

        def done(layer: int) -> None:
            if publish is not None and layer in ends:
                publish(ends[layer])

        x = self.embedding[batch.tokens].to(self.dtype)
        x, residual = self._run_layers(x, batch, cache, done, look)
        if batch.logit_rows is not None:
            x, residual = x[batch.logit_rows], residual[batch.logit_rows]
        x, _ = self.ops.rms_norm(x, residual, self.norm, self.spec.norm_eps)
        logits = self.ops.linear(x, self.head)
        return logits if self.group.size == 1 else self._gather(logits)

    @torch.inference_mode()
    def accompany(self) -> None:
        """Take part in a step of the ranks that share experts, with no tokens.

        Raises:
            WorkerError: another rank did not.
        """
        nobody = torch.empty(0, self.spec.hidden, dtype=self.dtype, device=self.device)
        for layer in self.layers:
            if isinstance(layer.mlp, Experts):
                layer.mlp.accompany(nobody, self.ops)

    def _gather(self, logits: Tensor) -> Tensor:
        vocabulary = self.spec.vocab_size
        if not len(logits):
            return logits.new_empty(0, vocabulary)
        return self.group.all_gather(logits)[:, :vocabulary].contiguous()
