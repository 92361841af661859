"""The feed-forward part of a layer that has experts: router, experts, and the experts that all tokens share."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.expert_weights import ExpertWeights
from ...kernels.moe_oracle import ExpertsSpec
from ...kernels.oracle import Ops
from ...kernels.routing import route
from ..expert_parallel import ExpertGroup
from .mlp import Mlp
from .parameters import Parameters
from .spec import ModelSpec

_GATE_UP = "gate_proj", "up_proj"
_DOWN = ("down_proj",)


def expert_prefix(layer: int) -> str:
    """What comes before the names of a layer's first expert's modules, which stand for those of all."""
    return f"model.layers.{layer}.mlp.experts.0."


def experts_spec(
    spec: ModelSpec, dtype: torch.dtype, tensor_parallel: int = 1, expert_parallel: int = 1
) -> ExpertsSpec | None:
    """What a model asks of its experts' kernel; None: it has no experts.

    Args:
        spec: of the whole model.
        dtype: of activations.
        tensor_parallel: ranks that share every expert.
        expert_parallel: ranks that have different experts.
    """
    moe = spec.moe
    if moe is None:
        return None
    quantization, schemes = spec.quantization, set()
    if quantization is not None:
        modules = [expert_prefix(layer) + name for layer in spec.moe_layers for name in (*_GATE_UP, *_DOWN)]
        schemes = {quantization.scheme_of(module) for module in modules}
    return ExpertsSpec(
        dtype=dtype,
        weights=next((scheme for scheme in schemes if scheme is not None), None),
        mixed=len(schemes) > 1,
        activation=moe.activation,
        biases=moe.biases,
        routing=moe.method,
        scaled=moe.scale != 1.0,
        router_bias=moe.router_bias,
        shared=moe.shared_inner > 0,
        num_experts=moe.num_experts,
        top_k=moe.top_k,
        hidden=spec.hidden,
        inner=moe.inner // tensor_parallel,
        tensor_parallel=tensor_parallel,
        expert_parallel=expert_parallel,
    )


class Experts:
    """Routes each token to some experts, and adds what these and the shared ones make of it.

    Each rank of several that share a model routes alike, and has a part of every expert's inner size. Its output is a
    part of the sum over ranks, to which the first adds the experts' last biases. Where ranks have different experts,
    each of those that share a model routes its part of the tokens, and its output is zero for the others.

    Args:
        spec: this rank's part of the model's.
        make: makes uninitialised parameters.
        rank: among those that share the model.
        layer: which.
        group: the ranks that have different experts, each with tokens of its own; None: all experts are here.

    Attributes:
        held: the experts that are here at first, in the order of the weights.
        router: [experts, hidden].
        router_bias: [experts], or None.
        correction: [experts], added where experts are chosen and not to their weights, or None.
        weights: of the experts; on no device ("meta") until the group has housed them, if they are movable.
        shared: one dense part, for the experts that all tokens go to, or None.
    """

    def __init__(
        self,
        spec: ModelSpec,
        make: Parameters,
        rank: int,
        layer: int,
        group: ExpertGroup | None = None,
    ) -> None:
        assert spec.moe is not None
        moe = self.spec = spec.moe
        self._group = group
        self._layer = sorted(spec.moe_layers).index(layer)
        self.held = list(range(moe.num_experts)) if group is None else group.maps.held(self._layer)
        count, prefix = len(self.held), expert_prefix(layer)
        own = make.on(torch.device("meta")) if group is not None and group.movable else make
        self.router = make(moe.num_experts, spec.hidden)
        self.router_bias = make(moe.num_experts) if moe.router_bias else None
        # Published corrections differ by less than bfloat16 can tell apart.
        self.correction = make(moe.num_experts).float() if moe.method == "sigmoid_grouped" else None
        self.weights = ExpertWeights(
            own.matrix(prefix, _GATE_UP, [moe.inner] * 2, spec.hidden, num_experts=count),
            own.matrix(prefix, _DOWN, [spec.hidden], moe.inner, cut_columns=group is None, num_experts=count),
            own(count, 2 * moe.inner) if moe.biases else None,
            own(count, spec.hidden) if moe.biases and (rank == 0 or group is not None) else None,
            moe.activation,
        )
        shared = f"model.layers.{layer}.mlp.shared_experts."
        self.shared = Mlp(spec.hidden, moe.shared_inner, make, False, rank, shared) if moe.shared_inner else None

    @property
    def whole(self) -> bool:
        """Whether the experts that are here are all here."""
        return self._group is not None

    def __call__(self, x: Tensor, ops: Ops) -> Tensor:
        if ops.moe.form == "monolithic":
            moe, own = self.spec, self.weights
            return ops.moe.compute(x, self.router, own.gate_up, own.down, moe.top_k, moe.renormalize)
        mine = slice(None) if self._group is None else self._group.part(len(x))
        logits = ops.linear(x[mine], self.router, self.router_bias)
        weights, ids = route(logits, self.spec.routing, self.correction)
        if self._group is None:
            out = ops.moe.compute(x, weights, ids, self.weights)
        else:
            out = self._across(self._group, x[mine], weights, ids, ops)
            if self._group.tensor_parallel > 1:
                whole = torch.zeros_like(x)
                whole[mine] = out
                out = whole
        return out if self.shared is None else out + self.shared(x, ops)

    def accompany(self, x: Tensor, ops: Ops) -> None:
        """Take part in a step of the ranks that share experts, with no tokens; ``x`` is [0, hidden].

        Raises:
            WorkerError: another rank did not.
        """
        assert self._group is not None
        nobody = x.new_empty(0, self.spec.top_k, dtype=torch.float32)
        self._across(self._group, x, nobody, nobody.long(), ops)

    def _across(self, group: ExpertGroup, x: Tensor, weights: Tensor, ids: Tensor, ops: Ops) -> Tensor:
        if group.fixed and group.direct is not None:
            arrived, slots = group.dispatch_direct(group.direct, self._layer, x, weights, ids)
            came = arrived.x, arrived.weights, arrived.ids, self.weights
            out = (
                ops.moe.compute(*came)
                if ops.moe.each is None
                else ops.moe.each(*came, arrived.x.shape[0] // group.size)
            )
            return group.combine_direct(group.direct, self._layer, out, slots)
        if group.fixed:
            placed = group.dispatch_fixed(self._layer, x, weights, ids)
            assert group.batched is not None
            return group.combine_fixed(group.batched.compute(placed.x, placed.counts, self.weights), placed)
        sent = group.dispatch(self._layer, x, weights, ids)
        return group.combine(ops.moe.compute(sent.x, sent.weights, sent.ids, self.weights), sent)
