"""Causal convolutions and selective scans, as Mamba layers have them between their linears.

Tensors are float32, bfloat16 or float16, each in a dtype of its own, with any strides. All is computed in float32 and
rounded once. None has a gradient. They raise RuntimeError when an argument does not fit, with nothing written.
"""

from __future__ import annotations

import torch

from .fakes import check_shape, register_fake
from .library import native


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    before: torch.Tensor | None = None,
    silu: bool = False,
) -> torch.Tensor:
    """Convolve each channel of `x` ``[B, D, L]`` with its row of `weight` ``[D, W]``, up to the token itself.

    `bias` is ``[D]``; `before` ``[B, D, W - 1]`` are the inputs before the first, 0 when None; `silu` of the result is
    taken if wanted. Returns ``[B, D, L]`` in the dtype of `x`.
    """
    return native.causal_conv1d.default(x, weight, bias, before, silu)


def causal_conv1d_update(
    x: torch.Tensor,
    state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    silu: bool = False,
) -> torch.Tensor:
    """`causal_conv1d` after the inputs in `state` ``[B, D, S]``, to which those in `x` are then written.

    S is at least ``W - 1``. The state holds the last S inputs or, with `starts`, int64 ``[B]``, is a ring: input i of a
    sequence is in column ``i % S``, and ``starts[b]`` is the number of the first of `x`.
    """
    return native.causal_conv1d_update.default(x, state, weight, bias, starts, silu)


def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    softplus: bool,
    state: torch.Tensor,
) -> torch.Tensor:
    """Recur ``h = exp(delta * a) * h + delta * b * u`` from `state` on; return ``(c . h + d * u) * silu(z)``.

    `u`, `delta` and `z` are ``[B, H, P, L]``, `a` ``[H, P, N]``, `b` and `c` ``[B, G, N, L]`` for groups of ``H / G``
    heads, `d` and `delta_bias` ``[H, P]``, `state` ``[B, H, P, N]``, which the last h is written to. `delta_bias` is
    added to `delta`, of which then `softplus` is taken if wanted.
    """
    return native.selective_scan.default(u, delta, a, b, c, d, z, delta_bias, softplus, state)


@register_fake("causal_conv1d")
def _(x, weight, bias, before, silu):
    check_shape("x", x, "[B, D, L]")
    return x.new_empty(x.shape)


@register_fake("causal_conv1d_update")
def _(x, state, weight, bias, starts, silu):
    check_shape("x", x, "[B, D, L]")
    return x.new_empty(x.shape)


@register_fake("selective_scan")
def _(u, *others):
    check_shape("u", u, "[B, H, P, L]")
    return u.new_empty(u.shape)
