"""`shard_low_precision_checkpoint`: the part of a quantized checkpoint that one rank of tensor parallelism computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from ..errors import ArgumentError

Config = Mapping[str, Any]

BY_HEADS = ("q_proj", "k_proj", "v_proj", "q_b_proj", "kv_b_proj", "qkv_proj")
"""Layers whose output features are split by attention heads."""

BY_GRAINS = ("gate_proj", "up_proj", "gate_up_proj", "fc_in", "fc1", "w1", "w3", "query_key_value", "dense_h_to_4h")
"""Layers whose output features are split by grains."""

INPUTS_BY_HEADS = ("o_proj", "out_proj")
"""Layers whose input features are split by attention heads; their outputs are summed over the ranks."""

INPUTS_BY_GRAINS = ("down_proj", "fc_out", "fc2", "w2", "dense", "dense_4h_to_h", "lm_head")
"""Layers whose input features are split by grains; their outputs are summed over the ranks."""

Layout = Mapping[str, tuple[int | None, int | None]]
"""The dimensions of output and of input features of each tensor; None for one that it does not have."""

PLAIN: Layout = {"weight": (0, 1), "weight_scale_inv": (0, 1), "weight_scale": (0, None), "bias": (0, None)}
PACKED: Layout = {**PLAIN, "qweight": (1, 0), "scales": (1, 0), "qzeros": (1, 0), "g_idx": (None, 0)}

LAYOUTS = {"awq": PACKED, "gptq": PACKED, "rtn": PACKED, "fp8": PLAIN, "int8": PLAIN}
"""The tensors of the methods of quantization."""


@dataclass(frozen=True)
class Share:
    """The units from `start` to `stop` of `total` equal ones."""

    start: int
    stop: int
    total: int

    @classmethod
    def of(cls, units: int, rank: int, world_size: int) -> Share:
        """The share of one rank; the first ranks take what does not go into equal ones."""
        each, more = divmod(units, world_size)
        start = each * rank + min(rank, more)
        return cls(start, start + each + (rank < more), units)

    def fits(self, size: int) -> bool:
        """Whether `size` elements hold whole units."""
        return size % self.total == 0

    def cut(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """The elements of the share along `dim`."""
        unit = tensor.shape[dim] // self.total
        return tensor.narrow(dim, self.start * unit, (self.stop - self.start) * unit)


def shard_low_precision_checkpoint(
    low_precision_checkpoint: Mapping[str, torch.Tensor],
    model_config: Any,
    rank: int,
    world_size: int,
    quantization_method: str,
    tp_grain_size: int,
    desc_act: bool,
    bits: int,
) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint that rank `rank` of `world_size` computes, by the layers' names.

    - Layers before an attention or in front of an MLP's activation are split by output features: the former by heads
      of keys and values (`num_key_value_heads` of `model_config`, a dict or a transformers configuration), the latter
      by `tp_grain_size` features, a multiple of 8 and of the group size. Of layers that join queries, keys and values,
      or gate and up, each part is split.
    - The layers behind them, and `lm_head`, are split by input features.
    - Where there are more units than fit, the first ranks take one more. Heads that do not divide the features make
      room for even parts.
    - With `desc_act`, act-order of GPTQ, layers split by input features keep all scales and zero points, to which
      their part of `g_idx` refers; without, `g_idx` is left out.
    - All else, biases behind a sum among it, is given whole.

    `quantization_method` is gptq, awq, rtn, fp8 or int8, with codes of `bits`. Raises ValueError for another one, for a
    rank that does not exist or would get nothing, and for features that do not divide.
    """
    if quantization_method not in LAYOUTS:
        raise ArgumentError(f"quantization_method: expected one of {sorted(LAYOUTS)}, got {quantization_method!r}")
    if tp_grain_size < 1 or tp_grain_size % 8:
        raise ArgumentError(f"tp_grain_size must be a multiple of 8, got {tp_grain_size}")
    if not 0 <= rank < world_size:
        raise ArgumentError(f"rank: expected one of 0..{world_size - 1}, got {rank} of {world_size}")
    config = model_config if isinstance(model_config, Mapping) else model_config.to_dict()
    packed = 32 // bits if quantization_method in ("gptq", "rtn") else 1
    sharding = Sharding(config, rank, world_size, tp_grain_size, bool(desc_act), LAYOUTS[quantization_method], packed)
    result: dict[str, torch.Tensor] = {}
    for name, tensors in _modules(low_precision_checkpoint):
        result |= {f"{name}.{key}" if name else key: tensor for key, tensor in sharding.cut(name, tensors).items()}
    return result


@dataclass(frozen=True)
class Sharding:
    """How the modules of one checkpoint are split, and which part is wanted.

    `packed` input features share one element of ``qweight``.
    """

    config: Config
    rank: int
    world_size: int
    grain: int
    act_order: bool
    layout: Layout
    packed: int

    def cut(self, name: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The part of the tensors of module `name`; all of them if it is not split."""
        rule = _rule(name)
        if rule is None or not all(key in self.layout for key in tensors):
            return dict(tensors)
        result = {key: tensor for key, tensor in tensors.items() if self.act_order or key != "g_idx"}
        by_input = rule in (INPUTS_BY_HEADS, INPUTS_BY_GRAINS)
        dims = self._dims(result, by_input)
        if not dims:
            return result
        sizes = {key: tensors[key].shape[dim] for key, dim in dims.items()}
        features = sizes["qweight"] * self.packed if by_input and "qweight" in sizes else max(sizes.values())
        parts = _parts(name, features, self.config)
        pieces = {key: [size * part // features for part in parts] for key, size in sizes.items()}
        units = _heads(self.config) if rule in (BY_HEADS, INPUTS_BY_HEADS) else max(min(parts) // self.grain, 1)
        share = Share.of(units, self.rank, self.world_size)
        if rule in (BY_HEADS, INPUTS_BY_HEADS) and not all(map(share.fits, chain(*pieces.values()))):
            share = Share.of(self.world_size, self.rank, self.world_size)
        for key, dim in dims.items():
            _check(f"{name}.{key}", share, pieces[key], sizes[key])
            cut = [share.cut(piece, dim) for piece in tensors[key].split(pieces[key], dim)]
            result[key] = torch.cat(cut, dim).contiguous()
        return result

    def _dims(self, tensors: Mapping[str, torch.Tensor], by_input: bool) -> dict[str, int]:
        """The dimension of each tensor that is split; without those that are one value for all features."""
        whole = ("scales", "qzeros") if by_input and self.act_order else ()
        dims = {key: self.layout[key][by_input] for key in tensors if key not in whole}
        return {key: dim for key, dim in dims.items() if dim is not None and tensors[key].shape[dim] > 1}


def _modules(checkpoint: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """The tensors of each module, by the module's name."""
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for full_name, tensor in checkpoint.items():
        name, _, key = full_name.rpartition(".")
        modules.setdefault(name, {})[key] = tensor
    yield from modules.items()


def _rule(name: str) -> tuple[str, ...] | None:
    """The group of layers that the module `name` belongs to; None if it is not split."""
    own = name.split(".")
    groups = (BY_HEADS, BY_GRAINS, INPUTS_BY_HEADS, INPUTS_BY_GRAINS)
    return next((group for group in groups if any(layer in own for layer in group)), None)


def _heads(config: Config) -> int:
    """The heads of keys and values."""
    return config.get("num_key_value_heads") or config["num_attention_heads"]


def _parts(name: str, features: int, config: Config) -> list[int]:
    """The output features of the layers that the module `name` joins; all for a single layer."""
    own = name.split(".")
    if "gate_up_proj" in own:
        return [features // 2] * 2
    if "qkv_proj" not in own:
        return [features]
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    keys = _heads(config) * size
    return [features - 2 * keys, keys, keys]


def _check(name: str, share: Share, pieces: list[int], size: int) -> None:
    if sum(pieces) != size or not all(map(share.fits, pieces)):
        raise ArgumentError(
            f"{name}: {size} elements cannot be split in {share.total} equal units; tp_grain_size must divide the "
            "features and be a multiple of the group size, the heads a multiple of the ranks"
        )
    if share.start == share.stop:
        raise ArgumentError(f"{name}: {share.total} units leave nothing for one of the ranks; use fewer ranks")
