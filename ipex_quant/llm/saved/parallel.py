"""Tensor parallelism of saved models: each process keeps its part of the linear layers that the model's plan names.

A process loads and packs the whole model, then replaces each planned layer by its part. All else is replicated.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer

from ...conversion.swap import return_freed_memory
from ...nn import Int8Linear, QuantizedModule, WeightOnlyQuantizedLinear
from ...numerics import affine
from ...numerics.quantized_weight import QuantizedWeight
from ...numerics.scheme import PER_CHANNEL

logger = logging.getLogger("ipex_quant")

COLWISE, ROWWISE = "colwise", "rowwise"
"""Styles of transformers' plans: a process has some of the output features, or of the input features."""

REPLICATED = frozenset(
    (
        "colwise_gather_output",
        "colwise_rep",
        "embedding_colwise",
        "embedding_rowwise",
        "replicate",
        "replicated_with_grad_allreduce",
        "rowwise_rep",
        "rowwise_split_input",
    )
)
"""Styles whose inputs and outputs are whole, or which divide nothing: every process may compute all of the module."""

_OTHER_SIZES = ("dp_size", "pp_size", "ep_size")


def ranks_of(model: nn.Module) -> int:
    """The number of processes among which the layers of `model` are divided."""
    return getattr(model, "_tp_size", None) or 1


def refuse_parts(model: nn.Module, action: str) -> None:
    """ValueError if `model` holds only this process's part of its layers, which has no use for `action`."""
    if ranks_of(model) > 1:
        raise ValueError(
            f"{action}: this process has only its part of a model that is divided among {ranks_of(model)}; load the "
            "model without tp_plan"
        )


def tensor_parallelism(tp_plan: str) -> Any:
    """transformers' configuration for `tp_plan`; RuntimeError for a transformers whose quantizers get no plan."""
    if not hasattr(HfQuantizer, "update_parallel_plan"):
        raise RuntimeError(f"tp_plan: expected transformers 5.23 or later, got {transformers.__version__}; update it")
    from transformers.distributed import DistributedConfig

    return DistributedConfig(tp_plan=tp_plan)


def take_plan(model: PreTrainedModel) -> dict[str, str] | None:
    """Take the model's plan out of the hands of transformers, which divides no packed weights, and return it.

    Returns None where no tensor parallelism was asked for. Raises ValueError for a plan of the caller's, and other
    kinds of parallelism.
    """
    asked = getattr(model.config, "distributed_config", None)
    if asked is None or asked.tp_size <= 1:
        return None
    if isinstance(asked.tp_plan, dict):
        raise ValueError(f"tp_plan: expected 'auto', the plan of the model's class, got {asked.tp_plan}")
    others = {name: size for name in _OTHER_SIZES if (size := getattr(asked, name)) > 1}
    if others:
        raise ValueError(f"distributed_config: quantized models have tensor parallelism only, got {others}")
    rules = dict(model.tp_plan)
    if rules:
        parameter = next(name for name, _ in model.named_parameters())
        model.tp_plan.clear()
        model.tp_plan[_generic(parameter)] = "replicate"  # transformers takes no empty plan; this rule does nothing
    return rules


def divide(model: PreTrainedModel, rules: Mapping[str, str]) -> None:
    """Replace each linear layer of `model` that `rules` name by this process's part, which is packed anew.

    The results of rowwise layers are summed over all processes. Raises ValueError for a layer that cannot be divided,
    and for rules of other kinds, naming the layer.
    """
    group = model._device_mesh.get_group("tp")
    share = Share(dist.get_rank(group), dist.get_world_size(group))
    styles = _planned(model, rules)
    if not styles:
        raise ValueError(f"tensor parallelism: the plan of {type(model).__name__} divides no layer; leave out tp_plan")
    _check_heads(model, styles, share)
    for names in _share_groups(model, styles):
        style, modules = styles.get(names[0]), [model.get_submodule(name) for name in names]
        try:
            parts = _parts(modules, style, share)
        except ValueError as error:
            raise ValueError(f"{', '.join(names)}: tensor parallelism: {error}") from error
        for name, module, part in zip(names, modules, parts, strict=True):
            model.set_submodule(name, part)
            if style == ROWWISE:
                bias = module.float_bias if isinstance(module, QuantizedModule) else module.bias
                part.register_forward_hook(AllReduce(group, None if bias is None else bias.detach().clone()))
    return_freed_memory()
    logger.info("%d linear layers are divided among %d processes, all else is in each", len(styles), share.ranks)
    model._tp_plan = dict(rules)  # transformers counts the heads of caches by it


class Share(NamedTuple):
    """Which of how many equal parts a process has."""

    rank: int
    ranks: int

    def of(self, name: str, size: int) -> slice:
        """The part of `size` features, or groups of them; ValueError when `ranks` does not divide it."""
        if size % self.ranks:
            raise ValueError(f"expected {name} that {self.ranks} processes divide, got {size}; use fewer processes")
        part = size // self.ranks
        return slice(self.rank * part, (self.rank + 1) * part)


class AllReduce:
    """A forward hook of a rowwise layer's part: sums the results of all processes, and adds the `bias` once.

    Gradients do not pass it: their computation raises RuntimeError.
    """

    def __init__(self, group: dist.ProcessGroup, bias: torch.Tensor | None) -> None:
        self.group = group
        self.bias = bias

    def __call__(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        total = _Sum.apply(output, self.group) if output.requires_grad else _all_reduce(output, self.group)
        return total if self.bias is None else total + self.bias.to(total.dtype)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        return _all_reduce(x.clone(), group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        raise RuntimeError("tensor parallelism of quantized models is for inference, it has no gradients")


def _all_reduce(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    x = x.contiguous()
    dist.all_reduce(x, group=group)
    return x


def _planned(model: nn.Module, rules: Mapping[str, str]) -> dict[str, str]:
    """The names of the linear layers to divide, each with `COLWISE` or `ROWWISE`."""
    modules = dict(model.named_modules())
    styles = {}
    for name in [*modules, *(name for name, _ in model.named_parameters())]:
        style = rules.get(_generic(name))
        if style is None or style in REPLICATED:
            continue
        kind = type(modules.get(name))
        if style not in (COLWISE, ROWWISE) or kind not in _DIVIDED:
            what = kind.__name__ if name in modules else "parameter"
            raise ValueError(f"{name}: tensor parallelism: cannot divide a {what} as {style!r}; leave out tp_plan")
        styles[name] = style
    return styles


def _generic(name: str) -> str:
    """`name` as plans have it, with ``*`` for the numbers of layers."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _check_heads(model: nn.Module, styles: Mapping[str, str], share: Share) -> None:
    """ValueError for projections of attention whose part would hold no whole heads."""
    for name, style in styles.items():
        size = getattr(model.get_submodule(name.rpartition(".")[0]), "head_dim", None)
        rows = model.get_submodule(name).out_features
        if style == COLWISE and isinstance(size, int) and rows % (size * share.ranks):
            raise ValueError(
                f"{name}: tensor parallelism: expected a number of heads that {share.ranks} processes divide, got "
                f"{rows / size:g}; use fewer processes"
            )


def _share_groups(model: nn.Module, styles: Mapping[str, str]) -> list[list[str]]:
    """The names of layers to replace, together those that remain one INT8 share group: its members of one style.

    Members of no style are among them, since they hold the packed weights of the whole group.
    """
    planned = {id(module.share_group) for name in styles if isinstance(module := model.get_submodule(name), Int8Linear)}
    groups: dict[Any, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, Int8Linear) and id(module.share_group) in planned:
            groups.setdefault((id(module.share_group), styles.get(name)), []).append(name)
        elif name in styles:
            groups[name] = [name]
    return list(groups.values())


def _parts(modules: list[Any], style: str | None, share: Share) -> list[nn.Module]:
    """The parts of `modules`, which are one layer or the members of a share group; rowwise ones have no bias."""
    parts = _DIVIDED[type(modules[0])](modules, style, share)
    return [part.train(module.training) for part, module in zip(parts, modules, strict=True)]


def _weight_only(modules: list[Any], style: str | None, share: Share) -> list[nn.Module]:
    parts = []
    for module in modules:
        weight, bias = _part_of(module.quantized_weight(), module.float_bias, style, share)
        modes = module.lowp_mode, module.act_quant_mode
        part = WeightOnlyQuantizedLinear.from_quantized_weight(weight, bias, *modes)
        parts.append(part.to(module.weight.dtype))
    return parts


def _int8(modules: list[Any], style: str | None, share: Share) -> list[nn.Module]:
    found = [_part_of(module.quantized_weight(), module.float_bias, style, share) for module in modules]
    activation, dtype = modules[0].activation, modules[0].weight.dtype
    if style == ROWWISE and activation is not None and activation.smoothing_factor is not None:
        columns = share.of("input features", modules[0].in_features)
        activation = replace(activation, smoothing_factor=activation.smoothing_factor[columns].clone())
    return [*Int8Linear.make_group([weight for weight, _ in found], [bias for _, bias in found], activation, dtype)]


def _float(modules: list[Any], style: str | None, share: Share) -> list[nn.Module]:
    parts = []
    for module in modules:
        weight, bias = module.weight.detach(), module.bias
        if style == COLWISE:
            rows = share.of("output features", module.out_features)
            weight, bias = weight[rows], None if bias is None else bias.detach()[rows]
        else:
            weight, bias = weight[:, share.of("input features", module.in_features)], None
        with torch.device("meta"):
            part = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None:
                setattr(part, name, nn.Parameter(tensor.clone(), requires_grad=module.weight.requires_grad))
        parts.append(part)
    return parts


_DIVIDED: dict[type, Callable[[list[Any], str | None, Share], list[nn.Module]]] = {
    WeightOnlyQuantizedLinear: _weight_only,
    Int8Linear: _int8,
    nn.Linear: _float,
}


def _part_of(
    weight: QuantizedWeight, bias: torch.Tensor | None, style: str | None, share: Share
) -> tuple[QuantizedWeight, torch.Tensor | None]:
    """The part of a weight, and the bias that its layer adds."""
    if style == COLWISE:
        rows = share.of("output features", weight.shape[0])
        return weight.select(rows), None if bias is None else bias[rows]
    return (columns_of(weight, share), None) if style == ROWWISE else (weight, bias)


def columns_of(weight: QuantizedWeight, share: Share) -> QuantizedWeight:
    """The weight of this process's input features; ValueError unless these are whole groups."""
    columns = share.of("input features", weight.shape[1])
    if weight.g_idx is not None:
        raise ValueError(
            "act-order (g_idx) spreads the groups over all input features, so that these cannot be divided; leave out "
            "tp_plan"
        )
    scheme, size = weight.scheme, columns.stop - columns.start
    codes = affine.plain_codes(affine.stored_codes(weight)[:, columns], scheme.dtype)
    tensors = {"codes": codes}
    for name, tensor in weight.tensors().items():
        group = scheme.super_group_size if name.startswith("super_") else scheme.group_size
        if name == "codes" or group == PER_CHANNEL:
            continue
        if size % group:
            raise ValueError(
                f"expected whole groups of {group} input features in each process, got {weight.shape[1]} features for "
                f"{share.ranks}; use fewer processes, or smaller groups"
            )
        tensors[name] = tensor[:, columns.start // group : columns.stop // group].contiguous()
    return replace(weight, **tensors, shape=(weight.shape[0], size))
