"""Attention within sequences of different lengths that are concatenated along the tokens."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import nn

from ... import ops
from ...ops.gradient import needs_gradient


class Options(NamedTuple):
    """Options of an attention call.

    A query sees up to `left` tokens before and `right` tokens after itself; a value below 0 means all. `softcap` 0 is
    none; `alibi` is float32 ``[H]`` or None; `dropout` is a probability, drawn from `generator`.
    """

    scale: float
    left: int = -1
    right: int = -1
    softcap: float = 0.0
    alibi: torch.Tensor | None = None
    dropout: float = 0.0
    generator: torch.Generator | None = None

    @property
    def native(self) -> bool:
        """Whether the native ops support these options."""
        return self.dropout == 0 and (self.right == 0 or (self.left < 0 and self.right < 0))

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the native ops."""
        window = self.left + 1 if self.left >= 0 else 0
        causal = self.right == 0
        return {"scale": self.scale, "causal": causal, "window": window, "softcap": self.softcap, "alibi": self.alibi}


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor | None,
    seqlen_q: torch.Tensor,
    seqlen_k: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """Attention of the queries of each sequence to its own keys; the result is written to `out` if given, and returned.

    - `query` ``[query tokens, H, D]``, `key` ``[key tokens, Hkv, D]``, `value` ``[key tokens, Hkv, Dv]``: of one dtype,
      float32, bfloat16 or float16; Hkv divides H. `out` is ``[query tokens, H, Dv]``.
    - `seqlen_q`, `seqlen_k`: integers ``[sequences + 1]``, the cumulative lengths of the sequences, from 0 on.

    The further arguments follow; `alibi_slopes` ``[H]`` or None may come before all of them, as in IPEX 2.8:

    - `max_seqlen_q`, `max_seqlen_k`: no less than the longest sequence.
    - `pdropout` = 0.0: the probability at which attention weights are dropped; `gen_` = None draws them.
    - `softmax_scale` = None: multiplies the scores, ``D ** -0.5`` when None.
    - `zero_tensors` = False, `return_softmax` = False: the first changes nothing, the second can only be False.
    - `is_causal` = True: a query sees nothing after itself. The last query of a sequence is at its last key; in IPEX
      the first query is at the first key.
    - `window_size_left` = -1, `window_size_right` = -1: how many tokens before and after itself a query sees, -1 all.
    - `softcap` = -1.0: if above 0, the c of ``c * tanh(score / c)``.

    The result of a query that sees no key is 0. Raises ValueError or TypeError when an argument does not fit; nothing
    is written then.
    """
    if args and (args[0] is None or (isinstance(args[0], torch.Tensor) and args[0].dim() > 0)):
        args, kwargs = args[1:], {"alibi_slopes": args[0], **kwargs}
    return _varlen_attention(query, key, value, out, seqlen_q, seqlen_k, *args, **kwargs)


class VarlenAttention(nn.Module):
    """Attention within sequences of different lengths that are concatenated along the tokens."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor | None,
        seqlen_q: torch.Tensor,
        seqlen_k: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """`ipex_quant.llm.functional.varlen_attention`."""
        return varlen_attention(query, key, value, out, seqlen_q, seqlen_k, *args, **kwargs)

    apply_function = staticmethod(varlen_attention)


def _varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor | None,
    seqlen_q: torch.Tensor,
    seqlen_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    pdropout: float = 0.0,
    softmax_scale: float | None = None,
    zero_tensors: bool = False,
    is_causal: bool = True,
    return_softmax: bool = False,
    gen_: torch.Generator | None = None,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = -1.0,
    alibi_slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    if return_softmax:
        raise ValueError("return_softmax: expected False, got True; the attention weights are never all in memory")
    if not 0.0 <= pdropout < 1.0:
        raise ValueError(f"pdropout: expected a probability of at least 0 and below 1, got {pdropout}")
    check_states(query, key, value)
    starts_q = read_starts("seqlen_q", seqlen_q, query.shape[0], max_seqlen_q)
    starts_k = read_starts("seqlen_k", seqlen_k, key.shape[0], max_seqlen_k)
    if len(starts_q) != len(starts_k):
        raise ValueError(f"seqlen_q, seqlen_k: expected one length, got {len(starts_q)} and {len(starts_k)}")
    options = read_options(
        query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
        is_causal,
        (window_size_left, window_size_right),
        softcap,
        check_slopes(alibi_slopes, query.shape[1]),
    )._replace(dropout=pdropout, generator=gen_)
    check_out(out, query, value.shape[2])
    result = attend((query, key, value), (starts_q, starts_k), options)
    return result if out is None else out.copy_(result)


def attend(
    states: tuple[torch.Tensor, torch.Tensor, torch.Tensor], starts: tuple[list[int], list[int]], options: Options
) -> torch.Tensor:
    """Attention within sequences: ``[L, H, Dv]`` of `states` ``[L, H, D]``, ``[T, Hkv, D]`` and ``[T, Hkv, Dv]``.

    `starts` are the cumulative numbers of queries and of keys of the sequences, from 0 on.
    """
    query, key, value = states
    in_torch = options.dropout > 0 or needs_gradient(query, key, value, options.alibi)
    if options.native and not in_torch:
        return ops.varlen_attention(query, key, value, *map(torch.tensor, starts), **options.arguments())
    run = _attend_in_torch if in_torch else _attend_in_window
    parts = [
        run(query[q0:q1], key[k0:k1], value[k0:k1], options)
        for (q0, q1), (k0, k1) in zip(*map(pairwise, starts), strict=True)
    ]
    return torch.cat(parts) if parts else query.new_empty(0, query.shape[1], value.shape[2])


def _attend_in_window(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: Options) -> torch.Tensor:
    """Attention with a mask, for windows that the native ops do not support."""
    arguments = options.arguments() | {"causal": False, "window": 0}
    mask = _visible(query.shape[0], key.shape[0], options.left, options.right)
    batched = (states.transpose(0, 1)[None] for states in (query, key, value))
    return ops.attention(*batched, mask=mask[None, None], **arguments)[0]


def _attend_in_torch(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: Options) -> torch.Tensor:
    group = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(group, dim=1).float() for states in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query.float(), key) * options.scale
    if options.softcap > 0:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if options.alibi is not None:
        scores = scores + options.alibi[:, None, None] * _distances(query.shape[0], key.shape[0])
    visible = _visible(query.shape[0], key.shape[0], options.left, options.right)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    weights = torch.where(visible.any(dim=-1, keepdim=True), weights, 0.0)
    if options.dropout > 0:
        kept = torch.empty_like(weights).bernoulli_(1 - options.dropout, generator=options.generator)
        weights = weights * kept / (1 - options.dropout)
    return torch.einsum("hqk,khd->qhd", weights, value).to(query.dtype)


def _distances(queries: int, keys: int) -> torch.Tensor:
    """Position of each key minus position of each query, ``[queries, keys]``."""
    return torch.arange(keys) - torch.arange(keys - queries, keys)[:, None]


def _visible(queries: int, keys: int, left: int, right: int) -> torch.Tensor:
    distances = _distances(queries, keys)
    visible = torch.ones_like(distances, dtype=torch.bool)
    if left >= 0:
        visible &= distances >= -left
    if right >= 0:
        visible &= distances <= right
    return visible


def check_states(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """ValueError or TypeError unless they are ``[L, H, D]``, ``[T, Hkv, D]`` and ``[T, Hkv, Dv]`` of one dtype."""
    shapes = [list(states.shape) for states in (query, key, value)]
    fits = all(len(shape) == 3 for shape in shapes) and shapes[1][:2] == shapes[2][:2] and shapes[1][1] > 0
    if not fits or shapes[0][2] != shapes[1][2] or shapes[0][1] % shapes[1][1]:
        raise ValueError(
            "query, key, value: expected [tokens, H, D], [tokens, Hkv, D] and [tokens, Hkv, Dv], where Hkv divides H, "
            f"got {shapes[0]}, {shapes[1]} and {shapes[2]}"
        )
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(f"query, key, value: expected one dtype, got {query.dtype}, {key.dtype} and {value.dtype}")


def read_starts(name: str, starts: torch.Tensor, tokens: int, longest: int) -> list[int]:
    """`starts` as a list; ValueError unless they ascend from 0 to `tokens` in steps of at most `longest`."""
    if starts.dim() != 1 or starts.numel() == 0 or starts.is_floating_point():
        raise ValueError(f"{name}: expected integers [sequences + 1], got {starts.dtype} {list(starts.shape)}")
    numbers = starts.tolist()
    steps = [stop - start for start, stop in pairwise(numbers)]
    if numbers[0] != 0 or numbers[-1] != tokens or any(step < 0 for step in steps):
        raise ValueError(f"{name}: expected starts of sequences from 0 up to {tokens} tokens, got {numbers}")
    if steps and max(steps) > longest:
        raise ValueError(f"{name}: expected sequences of at most {int(longest)} tokens, got one of {max(steps)}")
    return numbers


def check_slopes(slopes: torch.Tensor | None, heads: int) -> torch.Tensor | None:
    """Slopes of ALiBi in float32; ValueError unless there are `heads` of them, or none."""
    if slopes is None:
        return None
    if slopes.shape != (heads,):
        raise ValueError(f"alibi_slopes: expected shape [{heads}], got {list(slopes.shape)}")
    return slopes.float()


def check_out(out: torch.Tensor | None, query: torch.Tensor, value_dim: int) -> None:
    """ValueError unless `out` can hold the result of `query`."""
    shape = (*query.shape[:2], value_dim)
    if out is not None and (out.shape != shape or out.dtype != query.dtype):
        raise ValueError(f"out: expected {list(shape)} in {query.dtype}, got {list(out.shape)} in {out.dtype}")


def read_options(
    scale: float, causal: bool, window: tuple[int, int], softcap: float, alibi: torch.Tensor | None
) -> Options:
    """`Options` from IPEX's arguments, in which -1 is no window and no soft cap."""
    left, right = (max(int(size), -1) for size in window)
    return Options(float(scale), left, 0 if causal else right, max(float(softcap), 0.0), alibi)
