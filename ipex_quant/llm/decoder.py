"""The lean decoder: one layer of a known family in few native calls.

A layer keeps its modules under their names, so that its state dict, saving and whatever walks the model stay as they
are; only its `forward` is another one.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import ops
from ..ops import PostOp
from .attention import attention_forward
from .cache import Storage, attend
from .families import FAMILIES, Attention, Family, Layout, Mlp, Residual, Rope
from .fusing import activation_post_op, fused_linear, fused_linears
from .norms import Norm, norm_of

logger = logging.getLogger("ipex_quant")

_USED = ("attention_mask", "position_embeddings", "position_ids", "past_key_values", "layer_past")
_WITHOUT_EFFECT = ("use_cache", "output_hidden_states", "return_dict", "cache_position")
_KNOWN = _USED + _WITHOUT_EFFECT


def fuse_decoder(model: nn.Module) -> list[str]:
    """Let every decoder layer of `model` that is of a known family compute in few native calls; return their names.

    Call it again after modules were replaced, and `restore_decoder` before something has to call them one by one, such
    as calibration: hooks that are registered later on modules within a layer are not called. A fused layer runs stock
    code in training mode, under autocast, where gradients or attention weights are asked for, and where it gets an
    argument that it does not know. Why other layers of a known family stay stock is logged.
    """
    restore_decoder(model)
    fused = []
    for name, module in model.named_modules():
        if type(module).__name__ in FAMILIES:
            reason = _fuse(module)
            if reason is None:
                fused.append(name)
            else:
                logger.info("%s stays stock: %s", name, reason)
    return fused


def restore_decoder(model: nn.Module) -> None:
    """Undo `fuse_decoder`."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), FusedLayer):
            del module.forward


def _fuse(layer: nn.Module) -> str | None:
    """Give `layer` a lean forward; else return why it has none."""
    if "forward" in layer.__dict__:
        return "its forward was replaced"
    families = FAMILIES[type(layer).__name__]
    family = next((family for family in families if _holds(layer, family)), None)
    if family is None:
        return f"it has none of {[dict(family.requires) for family in families]}"
    try:
        layer.forward = _LAYERS[family.residual](layer, family)
    except _UnsuitableError as error:
        return str(error)
    return None


class _UnsuitableError(Exception):
    """A layer is not as its family's description says."""


def _holds(layer: nn.Module, family: Family) -> bool:
    return all(_get(layer, path, value) == value for path, value in family.requires.items())


def _get(module: nn.Module, path: str, *default: Any) -> Any:
    try:
        return attrgetter(path)(module) if path else module
    except AttributeError:
        if default:
            return default[0]
        raise _UnsuitableError(f"{type(module).__name__} has no {path}") from None


def _norm(module: nn.Module, path: str) -> Norm:
    norm = norm_of(_get(module, path))
    if norm is None:
        raise _UnsuitableError(f"{path} is no norm that is known")
    return norm


class FusedLayer:
    """What is in the place of a decoder layer's `forward`, with the same arguments and results."""

    def __init__(self, layer: nn.Module, family: Family) -> None:
        self.layer = layer
        self.names = list(inspect.signature(type(layer).forward).parameters)[2:]  # after self and the hidden states
        norms = [_norm(layer, name) for name in family.norms]
        self.first_norm, self.second_norm = norms[0], norms[1] if len(norms) == 2 else None
        self.attention = FusedAttention(_get(layer, family.attention.module), family.attention)
        self.mlp = StockMlp(layer.mlp) if family.mlp is None else FusedMlp(_get(layer, family.mlp.module), family.mlp)
        self.known = frozenset(_KNOWN + family.keywords)
        self.returns = family.returns
        self.clamps_float16 = family.clamps_float16

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args:
            kwargs.update(zip(self.names, args, strict=False))
        if self._needs_stock(hidden_states, kwargs):
            return type(self.layer).forward(self.layer, hidden_states, **kwargs)
        result = self.compute(hidden_states, kwargs)
        return (result, *map(kwargs.get, self.returns)) if self.returns else result

    def compute(self, x: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """Hidden states after the layer, called with `kwargs`."""
        raise NotImplementedError

    def _needs_stock(self, hidden_states: torch.Tensor, kwargs: dict[str, Any]) -> bool:
        if self.layer.training or torch.is_autocast_enabled("cpu"):
            return True
        for name, value in kwargs.items():
            if name not in self.known and value is not None and value is not False:
                return True
        if self.clamps_float16 and hidden_states.dtype == torch.float16:
            return True
        if not torch.is_grad_enabled():
            return False
        return hidden_states.requires_grad or any(parameter.requires_grad for parameter in self.layer.parameters())


class SequentialLayer(FusedLayer):
    """`Residual.SEQUENTIAL`, with attention to an encoder between the two parts where there is one."""

    def __init__(self, layer: nn.Module, family: Family) -> None:
        super().__init__(layer, family)
        self.cross = None
        if family.cross is not None:
            self.cross = CrossAttention(_get(layer, family.cross.module), family.cross)
            self.cross_norm = _norm(layer, family.cross_norm)

    def compute(self, x: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        x = self.attention(self.first_norm(x), kwargs, PostOp.ADD, x)
        if self.cross is not None and kwargs.get("encoder_hidden_states") is not None:
            x = self.cross(self.cross_norm(x), kwargs, PostOp.ADD, x)
        return self.mlp(self.second_norm(x), PostOp.ADD, x)


class ParallelLayer(FusedLayer):
    """`Residual.PARALLEL`"""

    def compute(self, x: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        normed = self.first_norm(x)
        attended = self.attention(normed, kwargs)
        return self.mlp(self.second_norm(x) if self.second_norm else normed, PostOp.ADD_ADD, attended, x)


class PostNormLayer(FusedLayer):
    """`Residual.POST_NORM`"""

    def compute(self, x: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        x = self.first_norm(self.attention(x, kwargs, PostOp.ADD, x))
        return self.second_norm(self.mlp(x, PostOp.ADD, x))


_LAYERS = {
    Residual.SEQUENTIAL: SequentialLayer,
    Residual.PARALLEL: ParallelLayer,
    Residual.POST_NORM: PostNormLayer,
}


Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Queries ``[B, L, H, D]``, keys and values ``[B, L, Hkv, D]``."""


class FusedAttention:
    """Projections, rotation, cache, attention and output projection of one layer."""

    def __init__(self, module: nn.Module, names: Attention) -> None:
        self.module = module
        self.names = names
        self.layer_index = _get(module, names.index)
        projections = [_get(module, name) for name in names.projections]
        output = _get(module, names.output)
        self.project = fused_linears(projections)
        self.output = fused_linear(output)
        self.split = _SPLITS[names.layout]
        self.head_size = _get(module, names.head_size)
        self.heads = output.in_features // self.head_size
        self.key_heads = (sum(each.out_features for each in projections) // self.head_size - self.heads) // 2
        self.scale = _get(module, names.scale, self.head_size**-0.5)
        self.norms = [_norm(module, name) for name in names.norms]
        self.rope = _ROPES[names.rope]
        self.interleaved = names.rope in (Rope.INTERLEAVED, Rope.TABLE)
        self.slopes = alibi_slopes(self.heads) if names.alibi else None

    def __call__(
        self, x: torch.Tensor, kwargs: dict[str, Any], post_op: PostOp = PostOp.NONE, *others: torch.Tensor
    ) -> torch.Tensor:
        query, key, value = self.split(self, self.project(x), *x.shape[:2])
        if self.norms:
            query, key = self.norms[0](query), self.norms[1](key)
        if self.rope is not None:
            cos, sin = self.rope(self, kwargs, query.dtype)
            rotated = cos.shape[-1] * (1 + self.interleaved)
            query = ops.rotary(query, cos, sin, rotated, self.interleaved)
            key = ops.rotary(key, cos, sin, rotated, self.interleaved)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        cache = kwargs.get(self.names.cache)
        if cache is not None:
            cache = getattr(cache, "self_attention_cache", cache)
            key, value = cache.update(key, value, self.layer_index)
        if self.names.position_bias and kwargs.get("position_bias") is None:
            kwargs["position_bias"] = self.relative_bias(query.shape[2], key.shape[2])
        attended = self.attend(query, key, value, kwargs.get("attention_mask"), kwargs)
        return self.output(attended.flatten(2), post_op, *others)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """``[B, L, H, D]`` of queries ``[B, H, L, D]`` over what the cache gave."""
        if self.slopes is None:
            bias = kwargs["position_bias"] if self.names.position_bias else None
            return attention_forward(self.module, query, key, value, mask, scaling=self.scale, position_bias=bias)[0]
        if mask is not None and self.names.masked_is_true:
            mask = ~mask
        options = {"causal": mask is None, "mask": mask}
        return attend(query, Storage.of(key), Storage.of(value), scale=self.scale, alibi=self.slopes, **options)

    def relative_bias(self, queries: int, keys: int) -> torch.Tensor | None:
        """What a module that has a `relative_attention_bias` adds to the scores of its layer and those after it."""
        if not self.module.has_relative_attention_bias:
            return None
        return self.module.compute_bias(queries, keys, past_seen_tokens=keys - queries)


class CrossAttention(FusedAttention):
    """Attention of a decoder to what an encoder gave, whose keys and values are computed once."""

    def __init__(self, module: nn.Module, names: Attention) -> None:
        super().__init__(module, names)
        query, *rest = names.projections
        self.query = fused_linear(_get(module, query))
        self.project = fused_linears([_get(module, name) for name in rest])

    def __call__(
        self, x: torch.Tensor, kwargs: dict[str, Any], post_op: PostOp = PostOp.NONE, *others: torch.Tensor
    ) -> torch.Tensor:
        query = self._heads(self.query(x))
        caches = kwargs.get(self.names.cache)
        if caches is not None and caches.is_updated.get(self.layer_index):
            layer = caches.cross_attention_cache.layers[self.layer_index]
            key, value = layer.keys, layer.values
        else:
            key, value = map(self._heads, self.project(kwargs["encoder_hidden_states"]))
            if caches is not None:
                key, value = caches.cross_attention_cache.update(key, value, self.layer_index)
                caches.is_updated[self.layer_index] = True
        attended = attention_forward(
            self.module, query, key, value, kwargs.get("encoder_attention_mask"), scaling=self.scale
        )[0]
        return self.output(attended.flatten(2), post_op, *others)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:2], -1, self.head_size).transpose(1, 2)


def alibi_slopes(heads: int) -> torch.Tensor:
    """How fast scores fall with the distance (Press et al., "Train Short, Test Long", 2022): float32 ``[heads]``.

    With a power of two heads, the slopes are the powers of ``2 ** (-8 / heads)``. Otherwise those of the next smaller
    power of two come first, then every second one of the next larger.
    """
    larger = 1 << (heads - 1).bit_length()
    slopes = torch.exp2(torch.arange(1, larger + 1) * (-8 / larger))
    return slopes if larger == heads else torch.cat([slopes[1::2], slopes[::2]])[:heads]


def _separate(attention: FusedAttention, projected: list[torch.Tensor], *shape: int) -> Heads:
    query, key, value = projected
    size = attention.head_size
    return query.view(*shape, -1, size), key.view(*shape, -1, size), value.view(*shape, -1, size)


def _blocks(attention: FusedAttention, projected: list[torch.Tensor], *shape: int) -> Heads:
    heads = projected[0].view(*shape, -1, attention.head_size)
    return heads.split((attention.heads, attention.key_heads, attention.key_heads), dim=2)


def _groups(attention: FusedAttention, projected: list[torch.Tensor], *shape: int) -> Heads:
    heads = projected[0].view(*shape, attention.key_heads, -1, attention.head_size)
    return heads[:, :, :, :-2].flatten(2, 3), heads[:, :, :, -2], heads[:, :, :, -1]


def _quarters(attention: FusedAttention, projected: list[torch.Tensor], *shape: int) -> Heads:
    heads = projected[0].view(*shape, 4, 3, -1, attention.head_size)
    query, value, key = (part.flatten(2, 3) for part in heads.unbind(3))
    return query, key, value


_SPLITS: dict[Layout, Callable[..., Heads]] = {
    Layout.SEPARATE: _separate,
    Layout.BLOCKS: _blocks,
    Layout.GROUPS: _groups,
    Layout.QUARTERS: _quarters,
}


Tables = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines ``[B or 1, L, R or R / 2]``."""


def _given(attention: FusedAttention, kwargs: dict[str, Any], dtype: torch.dtype) -> Tables:
    return kwargs["position_embeddings"]


def _given_halves(attention: FusedAttention, kwargs: dict[str, Any], dtype: torch.dtype) -> Tables:
    cos, sin = kwargs["position_embeddings"]
    return cos.chunk(2, dim=-1)[0], sin.chunk(2, dim=-1)[0]


def _looked_up(attention: FusedAttention, kwargs: dict[str, Any], dtype: torch.dtype) -> Tables:
    table = F.embedding(kwargs["position_ids"], attention.module.embed_positions)
    sin, cos = table.to(dtype).chunk(2, dim=-1)
    return cos, sin


_ROPES = {Rope.NONE: None, Rope.HALF: _given, Rope.INTERLEAVED: _given_halves, Rope.TABLE: _looked_up}


class FusedMlp:
    """Linear layers of an MLP, with the activation between them."""

    def __init__(self, module: nn.Module, names: Mlp) -> None:
        inputs = [_get(module, name) for name in names.inputs]
        self.activation = _get(module, names.activation)
        self.post_op = activation_post_op(self.activation)
        self.output = fused_linear(_get(module, names.output))
        self.first = fused_linear(inputs[0])
        self.inputs = fused_linears(inputs)
        if not names.gated:
            self.intermediate = self._activated
        else:
            self.intermediate = self._gated if len(inputs) == 2 else self._gated_halves

    def __call__(self, x: torch.Tensor, post_op: PostOp, *others: torch.Tensor) -> torch.Tensor:
        return self.output(self.intermediate(x), post_op, *others)

    def _activated(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.first(x)) if self.post_op is None else self.first(x, self.post_op)

    def _gated(self, x: torch.Tensor) -> torch.Tensor:
        if self.post_op is not None:
            return self.inputs.gated(x, self.post_op)
        gate, up = self.inputs(x)
        return self.activation(gate) * up

    def _gated_halves(self, x: torch.Tensor) -> torch.Tensor:
        joined = self.first(x)
        if self.post_op == PostOp.SILU:
            return ops.silu_mul_halves(joined)
        if self.post_op in (PostOp.GELU, PostOp.NEW_GELU):
            return ops.gelu_mul_halves(joined, self.post_op == PostOp.NEW_GELU)
        gate, up = joined.chunk(2, dim=-1)
        return self.activation(gate) * up


class StockMlp:
    """An MLP that is called as it is."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, x: torch.Tensor, post_op: PostOp, *others: torch.Tensor) -> torch.Tensor:
        result = self.module(x)
        for other in others:
            result = result + other
        return result
