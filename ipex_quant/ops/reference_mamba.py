"""Plain-torch definitions of the ops of selective state space models: the oracle of their tests, with gradients.

Tensors may have different float dtypes; all is computed in float32 and rounded once, to the dtype of the input.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def causal_conv1d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, before: torch.Tensor | None, silu: bool
) -> torch.Tensor:
    """Convolve each channel of `x` ``[B, D, L]`` with its row of `weight` ``[D, W]``, up to the token itself.

    `before` ``[B, D, W - 1]`` are the inputs before the first, 0 when None.
    """
    before = x.new_zeros(*x.shape[:2], weight.shape[1] - 1) if before is None else before
    inputs = torch.cat((before.float(), x.float()), -1)
    result = x.new_zeros(x.shape, dtype=torch.float32) if bias is None else bias.float()[:, None].expand(x.shape)
    for tap in range(weight.shape[1]):
        result = result + inputs[..., tap : tap + x.shape[2]] * weight.float()[:, tap, None]
    return (F.silu(result) if silu else result).to(x.dtype)


def causal_conv1d_update(
    x: torch.Tensor,
    state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    starts: torch.Tensor | None,
    silu: bool,
) -> torch.Tensor:
    """`causal_conv1d` after the inputs in `state` ``[B, D, S]``, to which those in `x` are then written.

    The state holds the last S inputs or, with `starts` ``[B]``, is a ring: input i of a sequence is in column
    ``i % S``, and ``starts[b]`` is the number of the first of `x`.
    """
    steps, columns, length = weight.shape[1] - 1, state.shape[2], x.shape[2]
    if starts is None:
        result = causal_conv1d(x, weight, bias, state[..., columns - steps :], silu)
        state.copy_(torch.cat((state, x.to(state.dtype)), -1)[..., length:])
        return result
    result = causal_conv1d(x, weight, bias, state.gather(2, _ring(starts, -steps, 0, state)), silu)
    first = max(length - columns, 0)  # of more than S inputs the last ones stay
    state.scatter_(2, _ring(starts, first, length, state), x[..., first:].to(state.dtype))
    return result


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Recur ``h = exp(delta * a) * h + delta * b * u`` from `state` on; return ``(c . h + d * u) * silu(z)`` and h.

    `u`, `delta` and `z` are ``[B, H, P, L]``, `a` ``[H, P, N]``, `b` and `c` ``[B, G, N, L]`` for groups of ``H / G``
    heads, `d` and `delta_bias` ``[H, P]``, `state` ``[B, H, P, N]``.
    """
    heads, length = u.shape[1], u.shape[3]
    delta = delta.float() if delta_bias is None else delta.float() + delta_bias.float()[..., None]
    delta = F.softplus(delta) if softplus else delta
    inputs, rates, h, sums = delta * u.float(), a.float(), state.float(), [u.new_empty(*u.shape[:3], 0).float()]
    for i in range(length):
        in_factors, out_factors = (
            factors[..., i].float().repeat_interleave(heads // max(factors.shape[1], 1), dim=1)[:, :, None]
            for factors in (b, c)
        )
        h = torch.exp(delta[..., i, None] * rates) * h + inputs[..., i, None] * in_factors
        sums.append((h * out_factors).sum(-1, keepdim=True))
    result = torch.cat(sums, -1)
    if d is not None:
        result = result + d.float()[..., None] * u.float()
    if z is not None:
        result = result * F.silu(z.float())
    return result.to(u.dtype), h


def _ring(starts: torch.Tensor, begin: int, end: int, state: torch.Tensor) -> torch.Tensor:
    """Columns of inputs ``starts + begin`` to ``starts + end`` of each sequence, for all channels of `state`."""
    numbers = starts.long()[:, None] + torch.arange(begin, end, device=starts.device)
    return numbers.remainder(max(state.shape[2], 1))[:, None].expand(-1, state.shape[1], -1)
