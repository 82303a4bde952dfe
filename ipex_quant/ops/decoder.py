"""Whole decoder layers for a few tokens.

The native op takes its arguments in three groups, each a class here: weights, call, structure. `decoder_layers` is the
only place that lays them out for it.
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
"""Of all sequences of a call together: up to here weights are streamed once for all of them."""


class DecoderWeights(NamedTuple):
    """Weights of several layers, those of a layer after another; an empty list stands for None in every place.

    - `packed`: data of packed weights, in each layer projections, their output, MLP inputs, MLP output. Those of one
      input have one dtype and group size. `biases` are float32, one or None for each.
    - `perms`: one or None for each of the four inputs that they have.
    - `norms`, `norm_biases`: of attention and MLP, ``[K]``, in the dtype of the input or float32.
    - `head_norms`: of queries and keys, ``[D]``, RMS or layer norms as the others.
    """

    packed: Sequence[torch.Tensor]
    biases: Sequence[torch.Tensor | None]
    perms: Sequence[torch.Tensor | None]
    norms: Sequence[torch.Tensor]
    norm_biases: Sequence[torch.Tensor | None]
    head_norms: Sequence[torch.Tensor]


class DecoderCall(NamedTuple):
    """What a call brings: rotation, caches and mask, as in `fused_rope_attention`.

    `caches` are keys and values of each layer, or these and their scales, or also the factors of the keys; they are
    written from ``starts[layer]`` on.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    rotary_dim: int
    caches: Sequence[torch.Tensor]
    starts: Sequence[int]
    mask: torch.Tensor | None = None
    alibi: torch.Tensor | None = None


@dataclass(frozen=True)
class DecoderStructure:
    """What the layers of a call have in common.

    - `projections`: 1 for a weight that gives queries, keys and values together, in this order; 3 for one each.
    - `mlp_inputs`: 2 for gates and factors, 1 for both in one weight or without gates (`gated`).
    - `activation`: RELU, GELU, NEW_GELU or SILU; with gates not RELU.
    - `parallel`: attention and MLP both see the layer's input, normed; otherwise the MLP sees what attention left.
    - `centered`: norms are layer norms, with `eps`, and not RMS norms.
    - `lowp_mode`, `act_quant_mode`: those of `woq_linear`.
    - `interleaved`: that of `rotary`; `scale` and `softcap` those of `attention`.
    """

    projections: int = 3
    mlp_inputs: int = 2
    activation: PostOp = PostOp.SILU
    gated: bool = True
    parallel: bool = False
    centered: bool = False
    eps: float = 1e-6
    lowp_mode: WoqLowpMode = WoqLowpMode.NONE
    act_quant_mode: WoqActQuantMode = WoqActQuantMode.NONE
    interleaved: bool = False
    scale: float = 1.0
    softcap: float = 0.0
    arguments: tuple[Any, ...] = field(init=False, repr=False, compare=False)
    """The values as the native op takes them."""

    def __post_init__(self) -> None:
        values = (
            *(self.projections, self.mlp_inputs, int(self.activation), self.gated, self.parallel, self.centered),
            *(self.eps, int(self.lowp_mode), int(self.act_quant_mode), self.interleaved, self.scale, self.softcap),
        )
        object.__setattr__(self, "arguments", values)


def native_arguments(
    x: torch.Tensor, weights: DecoderWeights, call: DecoderCall, structure: DecoderStructure
) -> tuple[Any, ...]:
    """The arguments of the native op in the order of its schema."""
    return (x, *weights, *call, *structure.arguments)


def decoder_layers(
    x: torch.Tensor, weights: DecoderWeights, call: DecoderCall, structure: DecoderStructure
) -> torch.Tensor:
    """Decoder layers with packed weights, one after the other, in one parallel region without a gap between them.

    `x` is float32, bfloat16 or float16 ``[B, L, K]`` with ``B * L <= MAX_TOKENS``. Has the bits of `rms_norm` or
    `layer_norm`, `woq_linear_group`, `fused_rope_attention`, `woq_linear`, and `woq_linear_gated` one after the other.
    Has no gradient. Returns what `x` is. Raises RuntimeError when an argument does not fit, with nothing written.
    """
    return _decoder_layers(*native_arguments(x, weights, call, structure))


@register_fake("decoder_layers")
def _(x, *arguments):
    weights, call = DecoderWeights(*arguments[:6]), DecoderCall(*arguments[6:13])
    projections, mlp_inputs = arguments[13:15]
    check_shape("x", x, "[B, L, K]")
    layers, linears = len(call.starts), projections + mlp_inputs + 2
    torch._check(layers > 0, lambda: "starts: expected one for each layer")
    for name, count, optional in (
        ("packed", linears, False),
        ("biases", linears, True),
        ("perms", 4, True),
        ("norms", 2, False),
        ("norm_biases", 2, True),
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
