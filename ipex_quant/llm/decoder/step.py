"""Fused decoder layers in one native call each, or in one together, for the few tokens of a decode step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, compress
from typing import Any, NamedTuple

import torch

from ...numerics.scheme import WoqActQuantMode, WoqLowpMode
from ...ops.decoder import MAX_TOKENS, DecoderCall, DecoderStructure, DecoderWeights, decoder_layers
from ...ops.post_op import GATES
from ..cache.layers import NativeLayer
from ..cache.paged import PagedCache
from .attention import FusedAttention
from .call import LayerCall
from .families import Residual, Rope
from .linears import MLP_ACTIVATIONS, Int8Call, LinearCall, LinearGroup, WeightOnlyCall, WeightOnlyGroup
from .norms import LayerNorm, Norm, OffsetNorm, Scale
from .parts import LayerParts

_RESIDUALS = (Residual.SEQUENTIAL, Residual.PARALLEL, Residual.SANDWICH)


def layer_step(parts: LayerParts) -> LayerStep | None:
    """The step that computes a layer in one native call; None if the native op does not support one of its parts."""
    attention, mlp, parallel = parts.attention, parts.mlp, parts.residual == Residual.PARALLEL
    if parts.residual not in _RESIDUALS or parts.cross is not None:
        return None
    second = parts.first_norm if parallel and parts.second_norm is None else parts.second_norm
    norms = [parts.first_norm, second, *parts.after]
    alike = {_norm_kind(norm) for norm in norms + attention.norms}
    kind, eps = alike.pop()
    if alike or kind not in (Norm, OffsetNorm, LayerNorm) or not _known_attention(attention):
        return None
    if any(norm.module._parameters.get("bias") is not None for norm in attention.norms):
        return None
    if not isinstance(getattr(mlp, "inputs", None), LinearGroup):
        return None
    groups = [_linears(group) for group in (attention.project, attention.output, mlp.inputs, mlp.output)]
    if not all(groups) or mlp.post_op not in (GATES if mlp.gated else MLP_ACTIVATIONS):
        return None
    modes = {linear.options[1:] for linear in chain(*groups) if isinstance(linear, WeightOnlyCall)}
    if len(modes) > 1:
        return None
    lowp_mode, act_quant_mode = modes.pop() if modes else (WoqLowpMode.NONE, WoqActQuantMode.NONE)
    structure = DecoderStructure(
        projections=len(groups[0]),
        mlp_inputs=len(groups[2]),
        activation=mlp.post_op,
        gated=mlp.gated,
        parallel=parallel,
        sandwich=parts.residual == Residual.SANDWICH,
        centered=kind is LayerNorm,
        eps=eps,
        offset=1.0 if kind is OffsetNorm else 0.0,
        lowp_mode=lowp_mode,
        act_quant_mode=act_quant_mode,
        interleaved=attention.interleaved,
        scale=attention.scale,
        softcap=attention.softcap,
    )
    joined = [group for group in (attention.project, mlp.inputs) if isinstance(group, WeightOnlyGroup)]
    return LayerStep([StepLayer(structure, attention, groups, joined, norms)])


def _norm_kind(norm: Norm | Scale | None) -> tuple[type, float]:
    if not isinstance(norm, Norm) or norm.module._parameters.get("weight") is None:
        return type(None), 0.0
    return type(norm), norm.eps


def _known_attention(attention: FusedAttention) -> bool:
    unknown = attention.clip or attention.names.joint_norms or attention.names.position_bias
    return attention.in_blocks and attention.is_causal and not unknown


def _linears(group: LinearGroup | LinearCall) -> list[WeightOnlyCall | Int8Call] | None:
    """The linears of `group` if they are all W8A8, or weight-only ones that one native call can compute; else None."""
    linears = group.linears if isinstance(group, LinearGroup) else [group]
    kinds = {type(linear) for linear in linears}
    if kinds == {WeightOnlyCall}:
        return linears if len(linears) == 1 or isinstance(group, WeightOnlyGroup) else None
    return linears if kinds == {Int8Call} else None


class Places(NamedTuple):
    """Where keys and values go: arguments of `DecoderCall`, and the cache layers to tell of the new tokens."""

    caches: list[torch.Tensor]
    starts: list[int]
    pages: tuple[torch.Tensor, ...]
    layers: list[NativeLayer]


class StepTensors(NamedTuple):
    """The modules' own dicts of tensors by name: of the linears, of the norms, and of the norms of heads."""

    linears: list[dict[str, Any]]
    norms: list[dict[str, Any]]
    head_norms: list[dict[str, Any]]


class StepLayer(NamedTuple):
    """A layer as the native call takes it, with the linears of each of its four inputs."""

    structure: DecoderStructure
    attention: FusedAttention
    linears: list[list[WeightOnlyCall | Int8Call]]
    groups: list[WeightOnlyGroup]
    norms: list[Norm]

    def common(self) -> tuple[Any, ...]:
        """The properties that must be equal in all layers of one native call."""
        attention = self.attention
        slopes = None if attention.slopes is None else tuple(attention.slopes.tolist())
        own_table = attention.layer_index if attention.names.rope is Rope.TABLE else None
        return self.structure, attention.names.rope, own_table, slopes


class LayerStep:
    """Computes consecutive layers with equal `StepLayer.common` in one native call."""

    def __init__(self, layers: Sequence[StepLayer]) -> None:
        self.layers = layers
        self.structure = layers[0].structure
        self.attentions = [layer.attention for layer in layers]
        self.groups = [group for layer in layers for group in layer.groups]
        inputs = [linears for layer in layers for linears in layer.linears]
        self.linears = [linear for linears in inputs for linear in linears]
        self.is_first = [linear is linears[0] for linears in inputs for linear in linears]
        self.norm_modules = [norm.module for layer in layers for norm in layer.norms]
        self.head_norm_modules = [norm.module for attention in self.attentions for norm in attention.norms]
        self.tensors: StepTensors | None = None  # one attribute, read once, since several threads may call

    @classmethod
    def joined(cls, steps: Sequence[LayerStep]) -> LayerStep | None:
        """One step for the layers of all `steps`; None if their `StepLayer.common` differs."""
        layers = [layer for step in steps for layer in step.layers]
        common = layers[0].common()
        return cls(layers) if all(layer.common() == common for layer in layers) else None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"tensors": None}  # a copy has other modules

    def find_tensors(self) -> StepTensors:
        """The modules' dicts of tensors, found once: torch.compile guards every attribute on the way to a tensor."""
        self._keep_tensors()
        return self.tensors

    @torch.compiler.assume_constant_result
    def _keep_tensors(self) -> None:
        if self.tensors is None:
            self.tensors = StepTensors(
                [linear.tensors() for linear in self.linears],
                [module._parameters for module in self.norm_modules],
                [module._parameters for module in self.head_norm_modules],
            )

    def __call__(self, x: torch.Tensor, call: LayerCall) -> torch.Tensor | None:
        """Hidden states after the layers; None, with nothing computed, if one call cannot compute them."""
        batch, length, _ = x.shape
        if batch * length > MAX_TOKENS or torch.jit.is_tracing():  # tracing cannot record lists of optional tensors
            return None
        if call.cache is None or (call.mask is not None and length > 1):
            return None
        places = self._reserve(x, call)
        found = self.find_tensors()
        perms = _given([tensors.get("_perm") for tensors in found.linears])
        if places is None or (perms and not all(group.one_order() for group in self.groups)):
            return None
        attention = self.attentions[0]
        weights = DecoderWeights(
            [tensors["_packed"] for tensors in found.linears],
            _given([tensors["_bias"] for tensors in found.linears]),
            list(compress(perms, self.is_first)),
            _given([tensors.get("_static_input") for tensors in found.linears]),
            [parameters["weight"] for parameters in found.norms],
            _given([parameters.get("bias") for parameters in found.norms]),
            [parameters["weight"] for parameters in found.head_norms],
        )
        native_call = DecoderCall(
            *attention.rotation(x, call),
            places.caches,
            places.starts,
            call.mask,
            attention.slopes,
            places.pages,
        )
        result = decoder_layers(x, weights, native_call, self.structure)
        for layer in places.layers:
            layer.commit(length)
        return result

    def _reserve(self, x: torch.Tensor, call: LayerCall) -> Places | None:
        if isinstance(call.cache, PagedCache):
            return self._paged(x, call.cache)
        reserved = []
        for attention in self.attentions:
            slots = attention.reserve(x, call)
            if slots is None:
                return None
            reserved.append(slots)
        caches = [tensor for each in reserved for tensor in each[1:6] if tensor is not None]
        return Places(caches, [each.start for each in reserved], (), [each.layer for each in reserved])

    def _paged(self, x: torch.Tensor, cache: PagedCache) -> Places | None:
        layers = [attention.layer_index for attention in self.attentions]
        step = cache.common_step(layers)
        if step is None or step.pages is None or step.dtype != x.dtype or x.shape[0] != 1:
            return None
        return Places([each for index in layers for each in step.caches[index]], [0] * len(layers), step.pages, [])


def _given(tensors: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """`tensors`, or an empty list, which is cheaper to pass, if all are None."""
    for tensor in tensors:  # `count` would ask every tensor whether it equals None, for microseconds each
        if tensor is not None:
            return tensors
    return []
