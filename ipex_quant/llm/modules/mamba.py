"""The convolutions and scans of selective state space models (Mamba, Gu and Dao, 2023, arXiv:2312.00752)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ... import ops
from ...numerics.scheme import FLOAT_DTYPES
from ...ops import reference_mamba as with_gradients
from ...ops.gradient import needs_gradient

ACTIVATIONS = (None, "silu", "swish")
"""What may follow a convolution; the last two are one function."""


class MambaMixer:
    """The parts of a Mamba layer between its linears.

    Tensors are float32, bfloat16 or float16, each in a dtype of its own, with any strides; results have the dtype of
    `x` or `u`. All is computed in float32 and rounded once. Raises ValueError or TypeError when an argument does not
    fit, NotImplementedError for an `activation` other than None, "silu" and "swish"; nothing is written then.
    """

    @classmethod
    def causal_conv1d_fn(
        cls,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        initial_states: torch.Tensor | None = None,
        return_final_states: bool = False,
        final_states_out: torch.Tensor | None = None,
        activation: str | None = "silu",
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Convolve each channel of `x` ``[B, D, L]`` with its row of `weight` ``[D, W]``, up to the token itself.

        Returns the result ``[B, D, L]`` and, if `return_final_states`, the last ``W - 1`` inputs ``[B, D, W - 1]``,
        else None. `initial_states`, of that shape too, are the inputs before the first, 0 when None; the final ones are
        written to `final_states_out` if given. `bias` is ``[D]``. Gradients pass, but not through final states.
        """
        silu = _check_convolution(x, weight, bias, activation)
        shape = (*x.shape[:2], weight.shape[1] - 1)
        _check(shape, "[B, D, W - 1]", initial_states=initial_states, final_states_out=final_states_out)
        graph = needs_gradient(x, weight, bias, initial_states)
        run = with_gradients.causal_conv1d if graph else ops.causal_conv1d
        result = run(x, weight, bias, initial_states, silu)
        if not return_final_states:
            return result, None
        before = x.new_zeros(shape) if initial_states is None else initial_states
        final = torch.cat((before.detach().to(x.dtype), x.detach()), -1)[..., x.shape[2] :]
        return result, final.clone() if final_states_out is None else final_states_out.copy_(final)

    @classmethod
    def causal_conv1d_update(
        cls,
        x: torch.Tensor,
        conv_state: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        activation: str | None = None,
        cache_seqlens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`causal_conv1d_fn` of the next tokens `x`, ``[B, D]`` or ``[B, D, L]``; returns the result in that shape.

        `conv_state` ``[B, D, S]``, where S is at least ``W - 1``, holds the last inputs and is brought up to date. With
        `cache_seqlens`, integers ``[B]``, it is a ring: input i of a sequence is in column ``i % S``, and
        ``cache_seqlens[b]`` is the number of the first of `x`. Gradients do not pass.
        """
        tokens = x[..., None] if x.dim() == 2 else x
        silu = _check_convolution(tokens, weight, bias, activation)
        _check((*tokens.shape[:2], None), "[B, D, W - 1 or more]", conv_state=conv_state)
        if conv_state.shape[2] < weight.shape[1] - 1:
            raise ValueError(
                f"conv_state: expected {weight.shape[1] - 1} columns or more, got {list(conv_state.shape)}"
            )
        if cache_seqlens is not None and (
            cache_seqlens.shape != tokens.shape[:1] or cache_seqlens.dtype not in (torch.int32, torch.int64)
        ):
            raise ValueError(
                f"cache_seqlens: expected int32 or int64 [{tokens.shape[0]}], got {cache_seqlens.dtype} "
                f"{list(cache_seqlens.shape)}"
            )
        starts = None if cache_seqlens is None else cache_seqlens.long().contiguous()
        with torch.no_grad():
            result = ops.causal_conv1d_update(tokens, conv_state, weight, bias, starts, silu)
        return result[..., 0] if x.dim() == 2 else result

    @classmethod
    def selective_state_update(
        cls,
        state: torch.Tensor,
        x: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None = None,
        z: torch.Tensor | None = None,
        dt_bias: torch.Tensor | None = None,
        dt_softplus: bool = False,
    ) -> torch.Tensor:
        """One step of `selective_scan_fn` from `state`, which it writes; returns the result in the shape of `x`.

        - `state` ``[B, D, N]`` or, of several heads, ``[B, H, D, N]``.
        - `x`, `dt`, `z`: ``[B, D]`` or ``[B, H, D]``; `A` ``[D, N]`` or ``[H, D, N]``.
        - `B`, `C`: ``[B, N]``, or ``[B, G, N]`` for groups of ``H / G`` heads.
        - `D`, `dt_bias`: ``[D]`` or ``[H, D]``.

        Gradients do not pass.
        """
        if state.dim() not in (3, 4):
            raise ValueError(f"state: expected [B, D, N] or [B, H, D, N], got {list(state.shape)}")
        heads = "H, " if state.dim() == 4 else ""
        _check(state.shape, "[B, D, N] or [B, H, D, N]", state=state)
        _check(state.shape[:-1], f"[B, {heads}D]", x=x, dt=dt, z=z)
        _check(state.shape[1:], f"[{heads}D, N]", A=A)
        _check(state.shape[1:-1], f"[{heads}D]", D=D, dt_bias=dt_bias)
        if not heads:
            state, x, dt, A = state[:, None], x[:, None], dt[:, None], A[None]
            z, D, dt_bias = _unsqueezed(1, z), _unsqueezed(0, D), _unsqueezed(0, dt_bias)
        B, C = (each[:, None] if each.dim() == 2 else each for each in (B, C))
        _check_groups(state.shape[1], (state.shape[0], None, state.shape[3]), "[B, N] or [B, G, N]", B=B, C=C)
        if B.shape[1] != C.shape[1]:
            B, C = (_for_each_head(each, state.shape[1]) for each in (B, C))
        u, delta, b, c = (each[..., None] for each in (x, dt, B, C))
        with torch.no_grad():
            result = ops.selective_scan(u, delta, A, b, c, D, _unsqueezed(-1, z), dt_bias, dt_softplus, state)
        return result[..., 0] if heads else result[:, 0, :, 0]

    @classmethod
    def selective_scan_fn(
        cls,
        u: torch.Tensor,
        delta: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None = None,
        z: torch.Tensor | None = None,
        delta_bias: torch.Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Recur ``h[l] = exp(d[l] * A) * h[l - 1] + d[l] * B[l] * u[l]`` from 0; return ``y[l] = C[l] . h[l]``.

        d is `delta` plus `delta_bias`, then its softplus if `delta_softplus`. ``D * u`` is added to y, and ``silu(z)``
        multiplies that, where these are given.

        - `u`, `delta`, `z`: ``[B, D, L]``; `A` ``[D, N]``; `D`, `delta_bias` ``[D]``.
        - `B`, `C`: ``[D, N]`` for all tokens, ``[B, N, L]``, or ``[B, G, N, L]`` for groups of ``D / G`` channels.

        Returns y ``[B, D, L]``; with `return_last_state` also the last h, float32 ``[B, D, N]``. Gradients pass.
        """
        _check((None, None, None), "[B, D, L]", u=u)
        batch, channels, length = u.shape
        _check((channels, None), "[D, N]", A=A)
        _check(u.shape, "[B, D, L]", delta=delta, z=z)
        _check((channels,), "[D]", D=D, delta_bias=delta_bias)
        B, C = (_grouped(each, batch, length) for each in (B, C))
        _check_groups(channels, (batch, None, A.shape[1], length), "[D, N], [B, N, L] or [B, G, N, L]", B=B, C=C)
        if B.shape[1] != C.shape[1]:
            B, C = (_for_each_head(each, channels) for each in (B, C))
        # Each channel is a head, of which several may share a group.
        u, delta, z = u[:, :, None], delta[:, :, None], _unsqueezed(2, z)
        A, D, delta_bias = A[:, None], _unsqueezed(1, D), _unsqueezed(1, delta_bias)
        state = torch.zeros(batch, channels, 1, A.shape[2], device=A.device)
        arguments = (u, delta, A, B, C, D, z, delta_bias, delta_softplus, state)
        if needs_gradient(u, delta, A, B, C, D, z, delta_bias):
            result, state = with_gradients.selective_scan(*arguments)
        else:
            result = ops.selective_scan(*arguments)
        return (result[:, :, 0], state[:, :, 0]) if return_last_state else result[:, :, 0]


def _check(sizes: Sequence[int | None], shape: str, **tensors: torch.Tensor | None) -> None:
    """ValueError or TypeError unless all `tensors` have these `sizes`, of which None may be any, and a float dtype."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{name}: expected float32, bfloat16 or float16, got {tensor.dtype}")
        fits = all(size in (None, given) for size, given in zip(sizes, tensor.shape, strict=False))
        if tensor.dim() != len(sizes) or not fits:
            wanted = ", ".join("any" if size is None else str(size) for size in sizes)
            raise ValueError(f"{name}: expected {shape}, here [{wanted}], got {list(tensor.shape)}")


def _check_groups(heads: int, sizes: Sequence[int | None], shape: str, **tensors: torch.Tensor) -> None:
    """`_check`, and ValueError unless the number of groups, the second size, divides `heads`."""
    _check(sizes, shape, **tensors)
    for name, tensor in tensors.items():
        groups = tensor.shape[1]
        if groups == 0 or heads % groups:
            raise ValueError(f"{name}: expected a number of groups that divides {heads}, got {groups}")


def _check_convolution(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None
) -> bool:
    """Whether SiLU follows; raises unless the arguments are those of a convolution."""
    if activation not in ACTIVATIONS:
        raise NotImplementedError(f"activation must be None, silu, or swish, got {activation!r}")
    _check((None, None, None), "[B, D, L]", x=x)
    _check((x.shape[1], None), "[D, W]", weight=weight)
    if weight.shape[1] == 0:
        raise ValueError(f"weight: expected [D, W] with W > 0, got {list(weight.shape)}")
    _check((x.shape[1],), "[D]", bias=bias)
    return activation is not None


def _grouped(factors: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    """`B` or `C` of a scan as ``[B, G, N, L]``, where a table of all channels is a group for each."""
    if factors.dim() == 2:
        return factors[None, ..., None].expand(batch, -1, -1, length)
    return factors[:, None] if factors.dim() == 3 else factors


def _for_each_head(factors: torch.Tensor, heads: int) -> torch.Tensor:
    """`B` or `C`, ``[B, G, ...]``, with as many groups as `heads`."""
    groups = factors.shape[1]
    return (
        factors.expand(-1, heads, *factors.shape[2:]) if groups == 1 else factors.repeat_interleave(heads // groups, 1)
    )


def _unsqueezed(dim: int, tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.unsqueeze(dim)
