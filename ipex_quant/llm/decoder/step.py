"""Fused decoder layers in one native call each, or in one together, for the few tokens of a decode step."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from itertools import chain, compress
from typing import Any, NamedTuple

import torch

from ...ops import PostOp
from ...ops.decoder import MAX_TOKENS, DecoderStructure
from .attention import FusedAttention, Room
from .families import Residual
from .linears import LinearGroup, WeightOnlyGroup, WeightOnlyLinear
from .norms import LayerNorm, Norm
from .parts import LayerParts

_decoder_layers = torch.ops.ipex_quant.decoder_layers.default
_GATES = (PostOp.GELU, PostOp.NEW_GELU, PostOp.SILU)


def layer_step(layer: LayerParts, residual: Residual) -> LayerStep | None:
    """What computes `layer` in one native call; None where it has a part that the call does not know."""
    attention, mlp, parallel = layer.attention, layer.mlp, residual == Residual.PARALLEL
    if (not parallel and residual != Residual.SEQUENTIAL) or layer.cross is not None or layer.after:
        return None
    norms = [layer.first_norm, layer.first_norm if parallel and layer.second_norm is None else layer.second_norm]
    alike = {_norm_kind(norm) for norm in norms + attention.norms}
    kind, eps = alike.pop()
    if alike or kind not in (Norm, LayerNorm) or not _known_attention(attention):
        return None
    if any(norm.module._parameters.get("bias") is not None for norm in attention.norms):
        return None
    if not isinstance(getattr(mlp, "inputs", None), LinearGroup):
        return None
    groups = [_linears(group) for group in (attention.project, attention.output, mlp.inputs, mlp.output)]
    if not all(groups) or mlp.post_op not in (_GATES if mlp.gated else (PostOp.RELU, *_GATES)):
        return None
    modes = {linear.options[1:] for linear in chain(*groups)}
    return LayerStep(layer, groups, norms, eps, parallel) if len(modes) == 1 else None


def _norm_kind(norm: Norm | None) -> tuple[type, float]:
    if norm is None or norm.module._parameters.get("weight") is None:
        return type(None), 0.0
    return type(norm), norm.eps


def _known_attention(attention: FusedAttention) -> bool:
    unknown = attention.clip or attention.names.joint_norms or attention.names.position_bias
    return attention.in_blocks and attention.is_causal and not unknown


def _linears(group: LinearGroup | WeightOnlyLinear) -> list[WeightOnlyLinear] | None:
    """Weight-only linears that one call multiplies by, or None."""
    linears = [group] if not isinstance(group, LinearGroup) else group.linears
    if not all(type(linear) is WeightOnlyLinear for linear in linears):
        return None
    return linears if len(linears) == 1 or isinstance(group, WeightOnlyGroup) else None


class StepTensors(NamedTuple):
    """What holds the tensors of the linears, the norms and the norms of heads, by name."""

    linears: list[dict[str, Any]]
    norms: list[dict[str, Any]]
    head_norms: list[dict[str, Any]]


class LayerStep:
    """Layers of one structure, one after the other, in one native call."""

    def __init__(
        self,
        layer: LayerParts,
        groups: Sequence[Sequence[WeightOnlyLinear]],
        norms: Sequence[Norm],
        eps: float,
        parallel: bool,
    ) -> None:
        attention = layer.attention
        self.attentions = [attention]
        self.groups = [group for group in (attention.project, layer.mlp.inputs) if isinstance(group, WeightOnlyGroup)]
        self.modules = [linear.module for group in groups for linear in group]
        self.is_first = [linear is group[0] for group in groups for linear in group]
        self.norm_modules = [norm.module for norm in norms]
        self.head_norm_modules = [norm.module for norm in attention.norms]
        self.tensors: StepTensors | None = None  # one attribute, read once, since several threads may call
        _, lowp_mode, act_quant_mode = groups[0][0].options
        self.structure = DecoderStructure(
            projections=len(groups[0]),
            mlp_inputs=len(groups[2]),
            activation=layer.mlp.post_op,
            gated=layer.mlp.gated,
            parallel=parallel,
            centered=type(norms[0]) is LayerNorm,
            eps=eps,
            lowp_mode=lowp_mode,
            act_quant_mode=act_quant_mode,
            interleaved=attention.interleaved,
            scale=attention.scale,
            softcap=attention.softcap,
        )

    def followed_by(self, others: Iterable[LayerStep]) -> LayerStep | None:
        """This layer and others in one call; None where they differ in structure."""
        if any(other.structure != self.structure for other in others):
            return None
        steps = [self, *others]
        together = copy.copy(self)
        for name in ("attentions", "groups", "modules", "is_first", "norm_modules", "head_norm_modules"):
            setattr(together, name, [item for step in steps for item in getattr(step, name)])
        return together

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"tensors": None}  # copied modules have other ones

    def find_tensors(self) -> StepTensors:
        """What holds the modules' tensors, found once: torch.compile guards every step on the way to each tensor."""
        self._keep_tensors()
        return self.tensors

    @torch.compiler.assume_constant_result
    def _keep_tensors(self) -> None:
        if self.tensors is None:
            self.tensors = StepTensors(
                [module._buffers for module in self.modules],
                [module._parameters for module in self.norm_modules],
                [module._parameters for module in self.head_norm_modules],
            )

    def __call__(self, x: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor | None:
        """Hidden states after the layers, called with `kwargs`; None with nothing done where it cannot be one call.

        The positions are those that the first layer finds in `kwargs`.
        """
        batch, length, _ = x.shape
        if batch * length > MAX_TOKENS or torch.jit.is_tracing():  # which cannot record lists of optional tensors
            return None
        attention, mask = self.attentions[0], kwargs.get("attention_mask")
        if mask is not None:
            if length > 1:
                return None
            mask = ~mask if attention.names.masked_is_true else mask
        rooms = self._reserve(x, kwargs, mask)
        found = self.find_tensors()
        perms = _given([tensors["_perm"] for tensors in found.linears])
        if rooms is None or (perms and not all(group.one_order() for group in self.groups)):
            return None
        if attention.rope is None:
            cos = sin = x.new_empty(1, length, 0)
        else:
            cos, sin = attention.rope(attention, kwargs, x.dtype)
        s = self.structure
        result = _decoder_layers(
            x,
            [tensors["_packed"] for tensors in found.linears],
            _given([tensors["_bias"] for tensors in found.linears]),
            list(compress(perms, self.is_first)),
            [parameters["weight"] for parameters in found.norms],
            _given([parameters.get("bias") for parameters in found.norms]),
            [parameters["weight"] for parameters in found.head_norms],
            s.eps,
            s.centered,
            s.projections,
            s.mlp_inputs,
            int(s.activation),
            s.gated,
            s.parallel,
            s.lowp_mode,
            s.act_quant_mode,
            cos,
            sin,
            cos.shape[-1] * (1 + s.interleaved),
            s.interleaved,
            [tensor for room in rooms for tensor in room[1:6] if tensor is not None],
            [room.start for room in rooms],
            s.scale,
            mask,
            s.softcap,
            attention.slopes,
        )
        for room in rooms:
            room.layer.commit(length)
        return result

    def _reserve(self, x: torch.Tensor, kwargs: dict[str, Any], mask: torch.Tensor | None) -> list[Room] | None:
        cache = kwargs.get(self.attentions[0].names.cache)
        if cache is None:
            return None
        layers = getattr(cache, "self_attention_cache", cache).layers
        rooms = []
        for attention in self.attentions:
            room = attention.reserve(layers, x, mask)
            if room is None:
                return None
            rooms.append(room)
        return rooms


def _given(tensors: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """`tensors`, or nothing if all are None, which costs less to hand over."""
    for tensor in tensors:  # `count` would ask every tensor whether it equals None, for microseconds each
        if tensor is not None:
            return tensors
    return []
