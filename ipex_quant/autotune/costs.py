"""`SchemeCosts`: bytes and estimated errors of every scheme for every share group of a model."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from tqdm import tqdm

from .. import ops
from ..conversion.example import Example
from ..nn.embeddings import is_embedding
from ..nn.linears import weight_matrix
from ..numerics.affine import dequantize, quantize
from ..numerics.quantized_weight import QuantizedWeight
from ..numerics.scheme import WeightScheme, WoqLowpMode
from ..woq.rtn import round_scales
from ..woq.towers import find_towers
from .allocation import Option
from .corrections import measured_factors
from .divergence import LayerSample
from .space import WeightOnlySpace

REFERENCE = 0.1
"""Divergence, in nats a token, at which estimates are compared with measurements.

It is small enough to be a quadratic form of the weights' errors, and well above the noise of rounding.
"""

GAINS = {"gptq": 0.15, "auto_round": 0.15, "awq": 0.5, "rtn": 1.0}
"""Errors that an algorithm leaves of those of rounding to nearest, in layers of transformer blocks.

GPTQ's is 0.11 to 0.17 and AWQ's 0.5 on the embedded model and SmolLM2-135M, with 3 and 4 bits in groups of 64 and 128.
AutoRound starts from GPTQ's.
"""


@dataclass(frozen=True)
class SchemeCost:
    """The cost of one scheme for a group: bytes, and the errors of its rounded weights and, if any, of its inputs."""

    scheme: WeightScheme | None
    bytes: int
    weight_error: float = 0.0
    input_error: float = 0.0


class SchemeCosts:
    """The costs of all schemes of `space` for `groups` of modules, which each have one scheme, by name.

    Bytes count only modules of `counted`. Errors come from `samples`; a module without one has none. Raises ValueError,
    with the name of a module, for an error that is not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        space: WeightOnlySpace,
        groups: Mapping[str, Sequence[str]],
        counted: Collection[str],
        samples: Mapping[str, LayerSample],
    ) -> None:
        self.model, self.space, self.groups = model, space, groups
        self.costs = {
            name: self._costs(group, counted, samples) for name, group in tqdm(groups.items(), "estimating errors")
        }
        self.blocks = _blocks(model)

    def options(self, name: str, lowp_mode: WoqLowpMode, algorithm: str) -> list[Option]:
        """The options of a group, the last of them in float."""
        gain = GAINS[algorithm] if name.startswith(self.blocks) else 1.0
        computed = self.space.quantizes_activations(lowp_mode)
        return [
            Option(each.scheme, each.bytes, gain * each.weight_error + computed * each.input_error)
            for each in self.costs[name]
        ]

    def correct(self, batches: Sequence[Example], names: Collection[str]) -> None:
        """Correct the errors of the groups `names` by `measured_factors`; they must be divergences."""
        schemes = {each.scheme: None for name in names for each in self.costs[name] if each.scheme is not None}
        by_scheme = {
            scheme: {name: cost.weight_error for name in names for cost in self.costs[name] if cost.scheme == scheme}
            for scheme in schemes
        }
        scheme, errors = min(
            by_scheme.items(), key=lambda item: abs(math.log(max(sum(item[1].values()), 1e-9) / REFERENCE))
        )
        groups = {name: self.groups[name] for name in names}

        def weight_of(name: str) -> torch.Tensor:
            return dequantize(rounded(matrix_of(self.model.get_submodule(name)), scheme))

        for name, factor in measured_factors(self.model, batches, groups, errors, weight_of).items():
            self.costs[name] = [
                replace(each, weight_error=each.weight_error * factor, input_error=each.input_error * factor)
                for each in self.costs[name]
            ]

    def _costs(
        self, group: Sequence[str], counted: Collection[str], samples: Mapping[str, LayerSample]
    ) -> list[SchemeCost]:
        modules = {name: self.model.get_submodule(name) for name in group}
        distinct = {id(module.weight): name for name, module in reversed(modules.items())}
        sizes = {name: modules[name].weight.nbytes for name in distinct.values() if name in counted}
        modes = [mode for mode in self.space.lowp_modes if self.space.quantizes_activations(mode)]
        input_errors: dict[int, float] = {}
        found = []
        for scheme in dict.fromkeys(each for mode in self.space.lowp_modes for each in self.space.schemes(mode)):
            size, error = 0, 0.0
            for name in group:
                weight = rounded(matrix_of(modules[name]), scheme)
                size += ops.pack_weight(weight).nbytes if name in sizes else 0
                error += samples[name].error(modules[name], dequantize(weight)) if name in samples else 0.0
            if modes and scheme.group_size not in input_errors:
                input_errors[scheme.group_size] = sum(
                    samples[name].activation_error(module, scheme.group_size, self.space.act_quant_mode)
                    for name, module in modules.items()
                    if name in samples and not is_embedding(module)
                )
            input_error = input_errors.get(scheme.group_size, 0.0)
            if not math.isfinite(error + input_error):
                raise ValueError(f"{group[0]}: expected a finite error as {scheme}, got {error}; check the weight")
            found.append(SchemeCost(scheme, size, error, input_error))
        return [*found, SchemeCost(None, sum(sizes.values()))]


def rounded(weight: torch.Tensor, scheme: WeightScheme) -> QuantizedWeight:
    """`weight` ``[N, K]`` rounded to nearest, with scales in float16 where that can hold them."""
    nearest = ops.quantize_weight(weight, scheme)
    try:
        return quantize(weight, scheme, round_scales(nearest.scales, torch.float16), nearest.zero_points)
    except ValueError:
        return nearest


def fits_half(weight: torch.Tensor, scheme: WeightScheme) -> bool:
    """Whether float16 can hold the scales of `weight`."""
    try:
        round_scales(ops.quantize_weight(weight, scheme).scales, torch.float16)
    except ValueError:
        return False
    return True


def matrix_of(module: nn.Module) -> torch.Tensor:
    """The weight ``[N, K]`` of a linear layer or an embedding."""
    return module.weight.detach() if is_embedding(module) else weight_matrix(module)


def _blocks(model: nn.Module) -> tuple[str, ...]:
    """What the names of modules in transformer blocks start with."""
    try:
        return tuple(f"{name}." for name in find_towers(model))
    except ValueError:
        return ()
