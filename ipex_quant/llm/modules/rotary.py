"""Rotary position embedding (Su et al., 2021, https://huggingface.co/papers/2104.09864)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ... import ops
from ...ops.gradient import needs_gradient

_TYPE_NAMES = {"su": "longrope", "deepseek_yarn": "yarn", "ntk": "dynamic"}
"""Old names in model configurations, with transformers' names of the same types."""

_LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Types whose frequencies change with the length of the sequence."""

_RELATIVE_TO_TRAINING = ("llama3", "longrope", "yarn")
"""Types that scale relative to the length of the original training, by default `max_position_embeddings`."""

_SCALING_KEYS = frozenset(
    (
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "factor",
        "high_freq_factor",
        "long_factor",
        "low_freq_factor",
        "max_position_embeddings",
        "mscale",
        "mscale_all_dim",
        "original_max_position_embeddings",
        "rope_ratio",
        "rope_theta",
        "rope_type",
        "short_factor",
        "truncate",
        "type",
    )
)


def rotary_embedding(
    query: torch.Tensor,
    key: torch.Tensor,
    sin: torch.Tensor,
    cos: torch.Tensor,
    rotary_dim: int,
    rotary_half: bool,
    position_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate the first `rotary_dim` features of every head of `query` and `key` in place, and return both.

    - `query`, `key`: float32, bfloat16 or float16 ``[B, L, heads, head_dim]`` or ``[tokens, heads, head_dim]``.
    - `sin`, `cos`: ``[rows, rotary_dim / 2]``, a value for every pair, or ``[rows, rotary_dim]``, every value twice, as
      two equal halves, as IPEX reads them, or as neighbours, for both values of `rotary_half`. There is a row for every
      token or for every one of the L positions; with `position_ids` they are tables that these index.
    - `rotary_half`: whether the features of a pair are half of `rotary_dim` apart (Llama) or neighbours (GPT-J).
    - `position_ids`: integers ``[B or 1, L]`` or ``[tokens]``, or None.

    Raises ValueError, RuntimeError or IndexError when an argument does not fit; nothing is written then.
    """
    tokens = query.shape[:-2]
    if query.dim() not in (3, 4) or key.dim() != query.dim() or key.shape[:-2] != tokens:
        raise ValueError(
            "query, key: expected [B, L, heads, head_dim] or [tokens, heads, head_dim] of the same tokens, got "
            f"{list(query.shape)} and {list(key.shape)}"
        )
    if not 0 < rotary_dim <= min(query.shape[-1], key.shape[-1]) or rotary_dim % 2:
        raise ValueError(
            f"rotary_dim: expected an even number up to {min(query.shape[-1], key.shape[-1])}, got {rotary_dim}"
        )
    batch, length = tokens if len(tokens) == 2 else (1, *tokens)
    cos = _table_rows("cos", cos, rotary_dim, (batch, length), position_ids)
    sin = _table_rows("sin", sin, rotary_dim, (batch, length), position_ids)
    states = [state if state.dim() == 4 else state[None] for state in (query, key)]
    rotated = [_rotated(state, cos, sin, rotary_dim, not rotary_half) for state in states]
    for state, result in zip((query, key), rotated, strict=True):
        state.copy_(result.view(state.shape))
    return query, key


class RotaryEmbedding(nn.Module):
    """Rotates pairs of features of queries and keys by angles proportional to their position.

    `pos_embd_dim` is the number of features that rotate, `base` the base of their frequencies. `extra_rope_config`
    scales the frequencies, as transformers' ``rope_parameters`` do (linear, dynamic, yarn, longrope, llama3; also its
    older spellings); its `rope_theta` replaces `base`, and its `rope_ratio` multiplies it. Scaling is relative to
    `max_position_embeddings`; positions beyond it are allowed. `backbone`, the name of a model class, has no effect:
    use `offset` and `extra_rope_config` for its effects in IPEX. Raises ValueError for an invalid configuration.
    """

    def __init__(
        self,
        max_position_embeddings: int,
        pos_embd_dim: int,
        base: float = 10000,
        backbone: str | None = None,
        extra_rope_config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if pos_embd_dim <= 0 or pos_embd_dim % 2:
            raise ValueError(f"pos_embd_dim: expected an even number above 0, got {pos_embd_dim}")
        self.max_position_embeddings = max_position_embeddings
        self.pos_embd_dim = pos_embd_dim
        self.base = base
        self.backbone = backbone
        self._config = _scaling_config(max_position_embeddings, pos_embd_dim, base, extra_rope_config or {})
        self._rope_type = self._config.rope_parameters["rope_type"]
        # A plain attribute, so that .to(torch.bfloat16) does not round the frequencies.
        self._frequencies = self._frequencies_at(None)

    def forward(
        self,
        x: torch.Tensor,
        position_ids: torch.Tensor,
        num_head: int,
        head_dim: int,
        offset: int,
        rotary_ndims: int,
        seq_len: int | None = None,
        num_concats: int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotate the first `rotary_ndims` features of every head; return a new tensor of the shape of `x`.

        - `x`: float32, bfloat16 or float16 ``[B, L, num_head, head_dim]``, or ``[B, L, num_head * head_dim]``.
        - `position_ids`: integers ``[B or 1, L]``, or a single element, the position of the first token.
        - `offset`: distance of the features of a pair, 1 (GPT-J) or half of `rotary_ndims` (Llama).
        - `seq_len`: tokens of the whole sequence, on which some scalings depend; found from the positions when None.
        - `num_concats`: when given, `x` is ``[B, L, (num_head + 2 * kv_heads) * head_dim]``, queries, keys and values;
          the result is these three, ``[B, L, heads, head_dim]`` each, with the values unchanged.

        Raises ValueError when an argument does not fit.
        """
        if rotary_ndims != self.pos_embd_dim:
            raise ValueError(f"rotary_ndims: expected pos_embd_dim, {self.pos_embd_dim}, got {rotary_ndims}")
        if offset not in (1, rotary_ndims // 2):
            raise ValueError(f"offset: expected 1 or half of rotary_ndims, {rotary_ndims // 2}, got {offset}")
        heads = _heads(x, num_head, head_dim, fused=num_concats is not None)
        cos, sin = self._cos_sin(_positions(position_ids, *heads.shape[:2]), seq_len)
        interleaved = offset == 1 and rotary_ndims != 2
        if num_concats is None:
            return _rotated(heads, cos, sin, rotary_ndims, interleaved).view(x.shape)
        kv_heads = (heads.shape[2] - num_head) // 2
        query_key, value = heads.split((num_head + kv_heads, kv_heads), dim=2)
        query, key = _rotated(query_key, cos, sin, rotary_ndims, interleaved).split((num_head, kv_heads), dim=2)
        return query, key, value

    apply_function = staticmethod(rotary_embedding)

    def extra_repr(self) -> str:
        return f"{self.max_position_embeddings}, {self.pos_embd_dim}, base={self.base}, type={self._rope_type}"

    def _cos_sin(self, positions: torch.Tensor, seq_len: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of `positions`, float32 ``[B or 1, L, pos_embd_dim / 2]`` each."""
        frequencies, factor = self._frequencies
        if self._rope_type in _LENGTH_DEPENDENT and positions.numel() > 0:
            length = int(positions.max()) + 1
            frequencies, factor = self._frequencies_at(max(length, seq_len or 0))
        angles = positions[..., None].float() * frequencies
        return angles.cos() * factor, angles.sin() * factor

    def _frequencies_at(self, seq_len: int | None) -> tuple[torch.Tensor, float]:
        """Frequencies, float32 ``[pos_embd_dim / 2]``, and the factor of cos and sin."""
        if self._rope_type == "default":
            exponents = torch.arange(0, self.pos_embd_dim, 2, dtype=torch.float32) / self.pos_embd_dim
            return 1.0 / self._config.rope_parameters["rope_theta"] ** exponents, 1.0
        return ROPE_INIT_FUNCTIONS[self._rope_type](self._config, torch.device("cpu"), seq_len=seq_len)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rotary_dim: int, interleaved: bool) -> torch.Tensor:
    if not needs_gradient(x, cos, sin):
        return ops.rotary(x, cos, sin, rotary_dim, interleaved)
    rotated, rest = x.split((rotary_dim, x.shape[-1] - rotary_dim), dim=-1)
    if interleaved:
        partner = torch.stack((-rotated[..., 1::2], rotated[..., ::2]), dim=-1).flatten(-2)
    else:
        partner = torch.cat((-rotated[..., rotary_dim // 2 :], rotated[..., : rotary_dim // 2]), dim=-1)
    cos, sin = (_per_feature(table, rotary_dim, interleaved)[:, :, None] for table in (cos, sin))
    return torch.cat(((rotated * cos + partner * sin).to(x.dtype), rest), dim=-1)


def _per_feature(table: torch.Tensor, rotary_dim: int, interleaved: bool) -> torch.Tensor:
    if table.shape[-1] == rotary_dim:
        return table
    return table.repeat_interleave(2, dim=-1) if interleaved else torch.cat((table, table), dim=-1)


def _heads(x: torch.Tensor, num_head: int, head_dim: int, fused: bool) -> torch.Tensor:
    """`x` as ``[B, L, heads, head_dim]``."""
    if x.dim() == 3 and x.shape[-1] % head_dim == 0:
        x = x.view(*x.shape[:2], -1, head_dim)
    kv_heads = (x.shape[2] - num_head) // 2 if x.dim() == 4 else 0
    heads = num_head + 2 * kv_heads if fused and kv_heads > 0 else num_head
    if x.dim() != 4 or x.shape[2:] != (heads, head_dim) or (fused and kv_heads <= 0):
        width = "num_head + 2 * kv_heads" if fused else "num_head"
        raise ValueError(
            f"x: expected [B, L, {width}, head_dim] with num_head {num_head} and head_dim {head_dim}, or these two "
            f"dimensions as one, got {list(x.shape)}"
        )
    return x


def _positions(position_ids: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    """Positions ``[B or 1, L]``."""
    if position_ids.is_floating_point():
        raise ValueError(f"position_ids: expected integers, got {position_ids.dtype}")
    if position_ids.numel() == 1:
        return position_ids.reshape(1, 1) + torch.arange(length)
    if position_ids.dim() != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != length:
        raise ValueError(
            f"position_ids: expected [{batch} or 1, {length}], or one element, got {list(position_ids.shape)}"
        )
    return position_ids


def _per_pair(name: str, table: torch.Tensor, rotary_dim: int) -> torch.Tensor:
    """`table` as ``[rows, rotary_dim / 2]``; it may have every value twice, as halves or as neighbours."""
    if table.shape[-1] != rotary_dim:
        return table
    first, second = table.chunk(2, dim=-1)
    neighbours = table[..., ::2]
    twice = (first == second).all()
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if not traced and not twice and not torch.equal(neighbours, table[..., 1::2]):
        raise ValueError(
            f"{name}: expected every value twice, as halves of a row or as neighbours in it, or once, in "
            f"[rows, {rotary_dim // 2}]; got features of a pair with different values"
        )
    return torch.where(twice, first, neighbours)


def _table_rows(
    name: str, table: torch.Tensor, rotary_dim: int, tokens: tuple[int, int], position_ids: torch.Tensor | None
) -> torch.Tensor:
    """The rows of `table` for the tokens ``[B, L]``: ``[B or 1, L, width]``."""
    batch, length = tokens
    width = table.shape[-1]
    if width not in (rotary_dim, rotary_dim // 2):
        raise ValueError(f"{name}: expected rotary_dim or half of it, {rotary_dim}, in the last dimension, got {width}")
    table = _per_pair(name, table.reshape(-1, width), rotary_dim)
    width = table.shape[-1]
    if position_ids is not None:
        if position_ids.is_floating_point() or position_ids.numel() not in (length, batch * length):
            raise ValueError(
                f"position_ids: expected integers [{batch} or 1, {length}], got {position_ids.dtype} "
                f"{list(position_ids.shape)}"
            )
        outside = (position_ids < 0) | (position_ids >= len(table))
        if outside.any():
            raise IndexError(f"position_ids: expected 0..{len(table) - 1}, the rows of {name}, got one beyond")
        return table[position_ids.reshape(-1, length)]
    if len(table) not in (length, batch * length):
        raise ValueError(
            f"{name}: expected a row for each of {batch * length} tokens or {length} positions, got {len(table)}"
        )
    return table.view(-1, length, width)


def _scaling_config(
    max_position_embeddings: int, pos_embd_dim: int, base: float, scaling: dict[str, Any]
) -> PreTrainedConfig:
    """The configuration from which transformers' functions compute rotary frequencies."""
    unknown = sorted(set(scaling) - _SCALING_KEYS)
    if unknown:
        raise ValueError(f"extra_rope_config: expected keys of {sorted(_SCALING_KEYS)}, got {unknown}")
    scaling = dict(scaling)
    rope_type = scaling.pop("type", None)
    rope_type = scaling.pop("rope_type", rope_type) or "default"
    rope_type = _TYPE_NAMES.get(rope_type, rope_type)
    if rope_type not in ("default", *ROPE_INIT_FUNCTIONS):
        raise ValueError(f"extra_rope_config: expected a rope_type of {sorted(ROPE_INIT_FUNCTIONS)}, got {rope_type!r}")
    theta = scaling.pop("rope_theta", base) * scaling.pop("rope_ratio", 1)
    length = scaling.pop("max_position_embeddings", max_position_embeddings)
    for name in ("short_factor", "long_factor"):
        if name in scaling and len(scaling[name]) != pos_embd_dim // 2:
            raise ValueError(f"extra_rope_config: expected {pos_embd_dim // 2} of {name}, got {len(scaling[name])}")
    if rope_type in _RELATIVE_TO_TRAINING:
        scaling.setdefault("original_max_position_embeddings", length)
    try:
        config = PreTrainedConfig(
            hidden_size=pos_embd_dim,
            num_attention_heads=1,
            head_dim=pos_embd_dim,
            max_position_embeddings=length,
            rope_parameters={"rope_type": rope_type, "rope_theta": theta, **scaling},
        )
        if rope_type != "default":
            ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"), seq_len=None)
    except (KeyError, TypeError) as error:
        raise ValueError(f"extra_rope_config: not what rope_type {rope_type!r} needs: {error}") from None
    return config
