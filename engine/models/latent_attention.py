"""The attention of DeepSeek's models: multi-head latent attention (arXiv:2405.04434)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.latent_attention import LatentNorm
from ...kernels.oracle import Ops
from ...kernels.schemes.packed import Packed, Weight
from ..batch import Batch
from .parameters import Parameters
from .spec import ModelSpec

_EPS = 1e-6
"""Of the two inner norms, whatever config.json says of the others."""


class LatentAttention:
    """From a layer's normalised input to its part of the sum over ranks.

    A rank of several has some of the heads. What is compressed, and what makes it so, all ranks have.

    Args:
        spec: this rank's part of the model's.
        index: which layer.
        make: makes uninitialised parameters.
        rank: among those that share the model; the first adds the last bias.
        kv_group: which blocks hold the layer's KV.
        place: where in a block.

    Attributes:
        down: [q_rank + kv_rank + rope_dim, hidden]: compresses queries, and keys and values; without the first part
            where queries are not compressed.
        down_bias: likewise, or None.
        q_norm: [q_rank], or None where queries are not compressed.
        q: [heads · (nope_dim + rope_dim), q_rank or hidden].
        kv_norm: [kv_rank].
        kv: [heads · (nope_dim + value_dim), kv_rank]: makes keys and values of latents. Until `absorb` as the
            checkpoint has it, then unpacked.
        o: [hidden, heads · value_dim].
        o_bias: [hidden], or None.
    """

    def __init__(self, spec: ModelSpec, index: int, make: Parameters, rank: int, kv_group: int, place: int) -> None:
        assert spec.latent is not None
        latent = self.latent = spec.latent
        prefix, heads = f"model.layers.{index}.self_attn.", spec.num_heads
        self.kv_group = kv_group
        self.place = place
        rows = {"kv_a_proj_with_mqa": latent.row_dim}
        if latent.q_rank:
            rows = {"q_a_proj": latent.q_rank} | rows
        self.down = make.matrix(prefix, tuple(rows), list(rows.values()), spec.hidden)
        self.down_bias = make(sum(rows.values())) if spec.qkv_bias else None
        self.q_norm = make(latent.q_rank) if latent.q_rank else None
        name = "q_b_proj" if latent.q_rank else "q_proj"
        self.q = make.matrix(prefix, (name,), [heads * latent.query_dim], latent.q_rank or spec.hidden)
        self.kv_norm = make(latent.kv_rank)
        kv_rows = heads * (latent.nope_dim + latent.value_dim)
        self.kv: Weight = make.matrix(prefix, ("kv_b_proj",), [kv_rows], latent.kv_rank)
        self.o = make.matrix(prefix, ("o_proj",), [spec.hidden], heads * latent.value_dim, cut_columns=True)
        self.o_bias = make(spec.hidden) if spec.o_bias else None
        self._added_bias = self.o_bias if rank == 0 else None

    def absorb(self, dtype: torch.dtype) -> None:
        """Unpack what makes keys and values of latents, now that it is loaded: queries and outputs take it apart."""
        self.kv = self.kv.dequantize(dtype) if isinstance(self.kv, Packed) else self.kv.to(dtype)

    def __call__(self, x: Tensor, batch: Batch, cache: Tensor, cos_sin: Tensor, ops: Ops) -> Tensor:
        latent = self.latent
        down = ops.multiply(x, self.down, self.down_bias)
        rows = down[:, latent.q_rank :]
        if self.q_norm is not None:
            x, _ = ops.rms_norm(down[:, : latent.q_rank].contiguous(), None, self.q_norm, _EPS)
        q = ops.multiply(x, self.q).unflatten(1, (-1, latent.query_dim))
        own = batch.groups[self.kv_group]
        norm = LatentNorm(self.kv_norm, _EPS)
        turned = ops.latent_write(
            q[..., latent.nope_dim :], rows, norm, latent.interleaved, cos_sin, batch.positions, cache, self.place,
            own.slots,
        )  # fmt: skip
        assert isinstance(self.kv, Tensor)
        keys, values = self.kv.unflatten(0, (q.shape[1], -1)).split([latent.nope_dim, latent.value_dim], dim=1)
        absorbed = torch.bmm(q[..., : latent.nope_dim].transpose(0, 1), keys).transpose(0, 1)
        seen = self._attend(torch.cat((absorbed, turned), dim=-1), batch, cache, ops)
        out = torch.bmm(seen.transpose(0, 1), values.transpose(1, 2)).transpose(0, 1)
        return ops.multiply(out.flatten(1), self.o, self._added_bias)

    def _attend(self, q: Tensor, batch: Batch, cache: Tensor, ops: Ops) -> Tensor:
        own, latent, single = batch.groups[self.kv_group], self.latent, batch.num_single
        lengths = batch.context_lens
        if own.spans is None:
            return ops.latent_decode(q, cache, self.place, own.block_tables, lengths, latent.scale, latent.kv_rank)
        out = ops.latent_prefill(q, cache, self.place, own.spans, latent.scale, latent.kv_rank)
        if single:
            out[:single] = ops.latent_decode(
                q[:single], cache, self.place, own.block_tables, lengths, latent.scale, latent.kv_rank
            )
        return out
