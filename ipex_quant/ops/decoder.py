"""Whole decoder layers for a few tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..numerics.scheme import WoqActQuantMode, WoqLowpMode
from . import library  # noqa: F401  (loads the native library)
from .fakes import check_shape, register_fake
from .post_op import PostOp

MAX_TOKENS = 8
"""Of all sequences of a call together: up to here weights are streamed once for all of them."""


@dataclass(frozen=True)
class DecoderStructure:
    """What the layers of a call have in common.

    - `projections`: 1 for a weight that gives queries, keys and values together, in this order; 3 for one each.
    - `mlp_inputs`: 2 for gates and factors, 1 for both in one weight or without gates (`gated`).
    - `activation`: RELU, GELU, NEW_GELU or SILU; with gates not RELU.
    - `parallel`: attention and MLP both see the layer's input, normed; otherwise the MLP sees what attention left.
    - `centered`: norms are layer norms, with `eps`, and not RMS norms.
    - `lowp_mode`, `act_quant_mode`: those of `woq_linear`.
    - `rotary_dim`, `interleaved`: those of `rotary`; `scale` and `softcap` those of `attention`.
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
    rotary_dim: int = 0
    interleaved: bool = False
    scale: float = 1.0
    softcap: float = 0.0


@dataclass(frozen=True)
class DecoderWeights:
    """Weights of several layers, those of a layer after another; an empty list stands for None in every place.

    - `packed`: data of packed weights, in each layer projections, their output, MLP inputs, MLP output. Those of one
      input have one dtype and group size. `biases` are float32, one or None for each.
    - `perms`: one or None for each of the four inputs that they have.
    - `norms`, `norm_biases`: of attention and MLP, ``[K]``, in the dtype of the input or float32.
    - `head_norms`: of queries and keys, ``[D]``, RMS or layer norms as the others.
    """

    packed: list[torch.Tensor] = field(default_factory=list)
    biases: list[torch.Tensor | None] = field(default_factory=list)
    perms: list[torch.Tensor | None] = field(default_factory=list)
    norms: list[torch.Tensor] = field(default_factory=list)
    norm_biases: list[torch.Tensor | None] = field(default_factory=list)
    head_norms: list[torch.Tensor] = field(default_factory=list)


def decoder_layers(
    x: torch.Tensor,
    weights: DecoderWeights,
    structure: DecoderStructure,
    cos: torch.Tensor,
    sin: torch.Tensor,
    caches: Sequence[torch.Tensor],
    starts: Sequence[int],
    mask: torch.Tensor | None = None,
    alibi: torch.Tensor | None = None,
) -> torch.Tensor:
    """Decoder layers with packed weights, one after the other, in one parallel region without a gap between them.

    `x` is float32, bfloat16 or float16 ``[B, L, K]`` with ``B * L <= MAX_TOKENS``. `caches` are keys and values of each
    layer, or these and their scales, or also the factors of the keys, which are written from ``starts[layer]`` on;
    they, `cos`, `sin`, `mask` and `alibi` are as in `fused_rope_attention`. Has the bits of `rms_norm` or `layer_norm`,
    `woq_linear_group`, `fused_rope_attention`, `woq_linear`, and `woq_linear_gated` one after the other. Has no
    gradient. Returns what `x` is. Raises RuntimeError when an argument does not fit, with nothing written.
    """
    return torch.ops.ipex_quant.decoder_layers(
        *(x, weights.packed, weights.biases, weights.perms, weights.norms, weights.norm_biases, weights.head_norms),
        *(structure.eps, structure.centered, structure.projections, structure.mlp_inputs, int(structure.activation)),
        *(structure.gated, structure.parallel, int(structure.lowp_mode), int(structure.act_quant_mode)),
        *(cos, sin, structure.rotary_dim, structure.interleaved, list(caches), list(starts)),
        *(structure.scale, mask, structure.softcap, alibi),
    )


@register_fake("decoder_layers")
def _(x, *arguments):
    check_shape("x", x, "[B, L, K]")
    return torch.empty_like(x, memory_format=torch.contiguous_format)
