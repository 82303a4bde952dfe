"""Whole decoder layers for a few tokens, in one native call.

The native op takes its arguments in three groups, each a class here: weights, call, structure. `native_arguments` puts
them in the op's order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..numerics.scheme import WoqActQuantMode, WoqLowpMode
from .fakes import check_shape, register_fake
from .library import native
from .post_op import PostOp

_decoder_layers = native.decoder_layers.default

MAX_TOKENS: int = native.max_decode_tokens()
"""Most tokens in a call, all sequences together."""


class DecoderWeights(NamedTuple):
    """Weights of several layers, layer after layer; an empty list stands for None in every position.

    - `packed`: data of packed weights; in each layer Q/K/V projections, output projection, MLP inputs, MLP output.
      Weights with the same input may differ in dtype and group size. `biases` are float32, one or None for each. An
      INT8 weight, that of a `PackedInt8` alone, multiplies a quantized input.
    - `perms`: `PackedWeight.perm` of each of the four different inputs in a layer, or None, as for INT8 weights.
    - `static_inputs`: how the input of each INT8 weight is quantized, float32 ``[2 + K]``: scale, zero point, then the
      multipliers of `quantize_activation`; None is per token. Weights given the same tensor quantize it once.
    - `norms`, `norm_biases`: of attention and MLP, and in a sandwich of the results of both, ``[K]``, in the dtype of
      the input or float32.
    - `head_norms`: of queries and keys, ``[D]``, RMS or layer norms like the others.
    """

    packed: Sequence[torch.Tensor]
    biases: Sequence[torch.Tensor | None]
    perms: Sequence[torch.Tensor | None]
    static_inputs: Sequence[torch.Tensor | None]
    norms: Sequence[torch.Tensor]
    norm_biases: Sequence[torch.Tensor | None]
    head_norms: Sequence[torch.Tensor]


class DecoderCall(NamedTuple):
    """Arguments that change from call to call: rotation, caches and mask, as in `fused_rope_attention`.

    `caches` has 2, 4 or 5 tensors for each layer: keys and values, then their scales, then the key factors. They are
    written from token ``starts[layer]`` on. With `pages`, those of `paged_rope_attention`, the caches are paged and
    the tokens, in a batch of 1 without `mask`, are those of several sequences; `starts` only counts the layers.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    rotary_dim: int
    caches: Sequence[torch.Tensor]
    starts: Sequence[int]
    mask: torch.Tensor | None = None
    alibi: torch.Tensor | None = None
    pages: Sequence[torch.Tensor] = ()


@dataclass(frozen=True)
class DecoderStructure:
    """Settings that all layers of a call share.

    - `projections`: 1 for one weight that gives queries, keys and values, in this order; 3 for one weight each.
    - `mlp_inputs`: 2 for a gate and an up weight; 1 for both in one weight, or for up alone if not `gated`.
    - `activation`: RELU, GELU, NEW_GELU or SILU; not RELU if `gated`.
    - `parallel`: attention and MLP both norm the layer's input; else the MLP norms the residual sum after attention.
    - `sandwich`: the results of attention and MLP are normed before they are added; not if `parallel`.
    - `centered`: norms are layer norms, not RMS norms; `eps` is for both. `offset` is added to their weights, in
      float32.
    - `lowp_mode`, `act_quant_mode`: those of `woq_linear`, without effect on INT8 weights.
    - `interleaved`: that of `rotary`; `scale` and `softcap` those of `attention`.
    """

    projections: int = 3
    mlp_inputs: int = 2
    activation: PostOp = PostOp.SILU
    gated: bool = True
    parallel: bool = False
    sandwich: bool = False
    centered: bool = False
    eps: float = 1e-6
    offset: float = 0.0
    lowp_mode: WoqLowpMode = WoqLowpMode.NONE
    act_quant_mode: WoqActQuantMode = WoqActQuantMode.NONE
    interleaved: bool = False
    scale: float = 1.0
    softcap: float = 0.0
    arguments: tuple[Any, ...] = field(init=False, repr=False, compare=False)
    """The values above as the native op takes them."""

    def __post_init__(self) -> None:
        values = (
            *(self.projections, self.mlp_inputs, int(self.activation), self.gated, self.parallel, self.sandwich),
            *(self.centered, self.eps, self.offset, int(self.lowp_mode), int(self.act_quant_mode)),
            *(self.interleaved, self.scale, self.softcap),
        )
        object.__setattr__(self, "arguments", values)


def native_arguments(
    x: torch.Tensor, weights: DecoderWeights, call: DecoderCall, structure: DecoderStructure
) -> tuple[Any, ...]:
    """Return the arguments of the native op in the order of its schema."""
    return (x, *weights, *call, *structure.arguments)


def decoder_layers(
    x: torch.Tensor, weights: DecoderWeights, call: DecoderCall, structure: DecoderStructure
) -> torch.Tensor:
    """Run decoder layers with packed weights one after another in a single parallel region; returns a tensor like `x`.

    `x` is float32, bfloat16 or float16 ``[B, L, K]`` with ``B * L <= MAX_TOKENS``. The bits are those of separate calls
    of `rms_norm` or `layer_norm`, `woq_linear_group`, `fused_rope_attention` (or `paged_rope_attention`), `woq_linear`
    and `woq_linear_gated`; with INT8 weights of `quantize_activation` or `quantize_activation_per_token`, `int8_linear`
    and `int8_linear_gated`. Has no gradient. Raises RuntimeError when an argument does not fit, with nothing written.
    """
    return _decoder_layers(*native_arguments(x, weights, call, structure))


@register_fake("decoder_layers")
def _(x, *arguments):
    weights, call = DecoderWeights(*arguments[:7]), DecoderCall(*arguments[7:15])
    projections, mlp_inputs, *_ = arguments[15:]
    norms = 4 if arguments[20] else 2
    check_shape("x", x, "[B, L, K]")
    layers, linears = len(call.starts), projections + mlp_inputs + 2
    torch._check(layers > 0, lambda: "starts: expected one for each layer")
    for name, count, optional in (
        ("packed", linears, False),
        ("biases", linears, True),
        ("perms", 4, True),
        ("static_inputs", linears, True),
        ("norms", norms, False),
        ("norm_biases", norms, True),
        ("head_norms", 2, True),
    ):
        got = len(getattr(weights, name))
        torch._check(
            got == layers * count or (optional and got == 0),
            lambda name=name, count=count, got=got: f"{name}: expected {count} for each of {layers} layers, got {got}",
        )
    for norm in (*weights.norms, *(bias for bias in weights.norm_biases if bias is not None)):
        check_shape("norms", norm, "[K]")
        torch._check(
            norm.shape[0] == x.shape[2], lambda norm=norm: f"norms: expected [{x.shape[2]}], got {list(norm.shape)}"
        )
    for static_input in weights.static_inputs:
        if static_input is not None:
            check_shape("static_inputs", static_input, "[2 + K]")
    buffers = len(call.caches) // layers
    torch._check(
        buffers in (2, 4, 5) and len(call.caches) == buffers * layers,
        lambda: f"caches: expected 2, 4 or 5 for each of {layers} layers, got {len(call.caches)}",
    )
    for i in range(0, len(call.caches), buffers):
        for cache in call.caches[i : i + 2]:
            check_shape("caches", cache, "[B, Hkv, capacity, D]")
    for name, table in (("cos", call.cos), ("sin", call.sin)):
        check_shape(name, table, "[B or 1, L, columns]")
    return torch.empty_like(x, memory_format=torch.contiguous_format)
