"""Folding BatchNorms into the convolutions and linear layers before them, with or without an example of inputs."""

from __future__ import annotations

from collections import Counter

import torch
from torch import fx, nn

from ..conversion.example import Example
from ..conversion.tidy import fold_batch_norm, fold_batch_norms
from .parts import traced_parts

_CONVOLUTIONS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
}
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class FoldedBatchNorm(nn.Identity):
    """Stands where a BatchNorm was that is folded into the layer before it, for inputs of `rank` dimensions.

    Their channels are the features of that layer. Raises AssertionError for inputs of another rank.
    """

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._assert(
            x.dim() == self.rank,
            f"a BatchNorm was folded for inputs of {self.rank} dimensions: optimize with linear_bn_folding=False",
        )
        return x


def fold(model: nn.Module, convolutions: bool, linears: bool, example: Example | None) -> None:
    """Fold each BatchNorm of `model` in evaluation mode into the layer whose output it alone reads, in place.

    What reads an output is found by `torch.fx` or, where that cannot trace the model, from a run of `example`, or else
    by tracing the parts that it can. Layers with hooks stay. `convolutions` and `linears` say which layers to consider.
    """
    kinds = (*(_CONVOLUTIONS if convolutions else ()), *((nn.Linear,) if linears else ()))
    layers = {name for name, module in model.named_modules() if type(module) in kinds and _is_plain(module)}
    norms = {module for module in model.modules() if type(module) in _BATCH_NORMS and _is_plain(module)}
    if not layers or not any(norm.running_mean is not None for norm in norms):
        return
    graphs = traced_parts(model, _BATCH_NORMS)
    if example is not None and [prefix for prefix, _ in graphs] != [""]:
        fold_batch_norms(model, layers, example)
        return
    for layer, norm in _pairs(model, graphs):
        if layer in layers and model.get_submodule(norm) in norms:
            _fold_pair(model, layer, norm)


def _is_plain(module: nn.Module) -> bool:
    return not (module.training or module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _fold_pair(model: nn.Module, layer: str, norm: str) -> None:
    first, second = model.get_submodule(layer), model.get_submodule(norm)
    if isinstance(first, nn.Linear):
        scalar = second.num_features == 1  # whatever the rank, all values are scaled alike
        features = type(second) is nn.BatchNorm1d and second.num_features == first.out_features
        if features or scalar:
            fold_batch_norm(model, layer, norm, nn.Identity() if scalar else FoldedBatchNorm(2))
    elif type(second) is _CONVOLUTIONS[type(first)]:
        fold_batch_norm(model, layer, norm, nn.Identity())


def _pairs(model: nn.Module, graphs: list[tuple[str, fx.Graph]]) -> list[tuple[str, str]]:
    """Names of a module and of the one that alone reads its output, where both are called once."""
    found, calls = [], Counter[nn.Module]()
    exposed: set[nn.Module] = set()
    for prefix, graph in graphs:
        for node in graph.nodes:
            name = prefix + str(node.target)
            if node.op == "get_attr":
                exposed.add(model.get_submodule(name.rpartition(".")[0]))
            if node.op != "call_module":
                continue
            calls[model.get_submodule(name)] += 1
            source = node.args[0] if len(node.args) == 1 and not node.kwargs else None
            if isinstance(source, fx.Node) and source.op == "call_module" and len(source.users) == 1:
                found.append((prefix + str(source.target), name))
    once = {module for module, count in calls.items() if count == 1} - exposed
    return [pair for pair in found if once.issuperset(model.get_submodule(name) for name in pair)]
