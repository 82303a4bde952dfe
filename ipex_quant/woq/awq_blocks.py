"""AWQ for every linear in the transformer blocks of a model, and the modules that take the reciprocals of scales."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from ..nn.linears import weight_matrix
from ..nn.norms import is_norm, scaled_vectors
from ..numerics.affine import dequantize
from ..numerics.quantized_weight import QuantizedWeight
from ..numerics.scheme import WeightScheme
from .absorbers import Absorber, find_absorber
from .awq import AwqOptions, InputSample, ScaleSearch, clipped, search_scale
from .gptq import HessianAccumulator, quantize_weight
from .gptq_blocks import named
from .layer_walk import SchemeOf, Walk, calibrate, calibrate_pairs, find_stages, first_names, set_weight, walk_blocks
from .rtn import round_scales, rtn

logger = logging.getLogger("ipex_quant")

_NORM_OFFSETS = (0.0, 1.0)
"""Constants that norms add to their weight: 0, or 1 as in Gemma."""


@dataclass(frozen=True)
class Scaling:
    """The scaling of one share group, the linears `members`; names are those in the model.

    `scale`, float32 ``[K]``, multiplied the input channels of their weights before quantization; `factor`, float32
    ``[M]``, multiplied the output channels of `absorber`. All three are None for a group that is not scaled, `search`
    too if no module can absorb a scale; else `search` holds the errors.
    """

    members: tuple[str, ...]
    absorber: str | None = None
    scale: torch.Tensor | None = None
    factor: torch.Tensor | None = None
    search: ScaleSearch | None = None


@dataclass(frozen=True)
class AwqResult:
    """Quantized weights by module name, new values of other parameters by name, and how share groups were scaled."""

    weights: dict[str, QuantizedWeight]
    parameters: dict[str, torch.Tensor]
    scalings: list[Scaling]


def awq_blocks(
    model: nn.Module,
    batches: Sequence[Mapping[str, torch.Tensor]],
    scheme: WeightScheme | SchemeOf,
    options: AwqOptions | None = None,
    also: Sequence[str] = (),
) -> AwqResult:
    """AWQ for every linear in the transformer blocks of `model` and those of `also`, as `walk_blocks` takes them.

    A share group's reciprocal scale goes into the norm before it, or into the row scales and the bias of a linear that
    is already quantized. A group without such a module is only clipped, or rounded by GPTQ. Raises as `walk_blocks`
    and, where it rounds, GPTQ's `quantize_weight` do, and ValueError for inputs that are NaN or Inf, naming the linear.
    """
    blocks = _AwqBlocks(model, options or AwqOptions())
    weights = walk_blocks(model, batches, scheme, blocks, blocks.scale_dtype, also)
    scaled = sum(scaling.scale is not None for scaling in blocks.scalings)
    logger.info("AWQ: %d of %d share groups are scaled", scaled, len(blocks.scalings))
    if blocks.only_clipped:
        warnings.warn(
            f"AWQ: nothing in {len(blocks.only_clipped)} blocks can absorb a scale, so that their layers are only "
            f"clipped: {first_names(blocks.only_clipped)}",
            stacklevel=3,
        )
    return AwqResult(weights, blocks.parameters, blocks.scalings)


class _AwqBlocks:
    title = "AWQ"

    def __init__(self, model: nn.Module, options: AwqOptions) -> None:
        self.options = options
        self.scale_dtype = (options.gptq or options).scale_dtype
        self.parameters: dict[str, torch.Tensor] = {}
        self.scalings: list[Scaling] = []
        self.only_clipped: list[str] = []  # first layers of blocks in which nothing can be scaled
        uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
        self._shared = {key for key, count in uses.items() if count > 1}

    def __call__(self, walk: Walk, index: int, schemes: Mapping[str, WeightScheme]) -> dict[str, QuantizedWeight]:
        found: dict[str, QuantizedWeight] = {}
        before = len(self.scalings)
        corrects = self.options.gptq is not None and self.options.gptq.correction > 0
        if corrects:
            walk.record_float(index)
        collect = calibrate_pairs if corrects else calibrate
        for stage in find_stages(walk, index, list(schemes)):
            seen = collect(walk, index, stage, partial(_Inputs, options=self.options))
            for members, inputs in zip(stage.groups, seen, strict=True):
                if inputs.count:
                    _Group(self, walk, index, members, inputs).quantize(schemes, found)
        own = self.scalings[before:]
        if own and self.options.alpha_steps and all(scaling.search is None for scaling in own):
            self.only_clipped.append(own[0].members[0])
        return found

    def is_shared(self, module: nn.Module) -> bool:
        """Whether another module has a parameter of this one too."""
        return any(id(parameter) in self._shared for parameter in module.parameters(recurse=False))


class _Inputs:
    """What AWQ and, if it rounds, GPTQ need to know of the inputs of a share group."""

    def __init__(self, in_features: int, options: AwqOptions) -> None:
        self.sample = InputSample(in_features, options.tokens)
        self.products = None if options.gptq is None else HessianAccumulator(in_features)

    @property
    def count(self) -> int:
        """Number of input vectors so far."""
        return self.sample.count

    @property
    def power(self) -> torch.Tensor:
        """A number ``[K]`` for each input channel that is 0 if all its inputs were, else above 0."""
        return self.sample.power

    def add(self, inputs: torch.Tensor, float_inputs: torch.Tensor | None = None) -> None:
        """Take in a batch of inputs ``[..., K]``, and what they are in the float model, if known."""
        self.sample.add(inputs)
        if self.products is not None:
            self.products.add(inputs, float_inputs)


class _Group:
    """One share group of a block, from the search of its scale to its quantized weights."""

    def __init__(self, owner: _AwqBlocks, walk: Walk, index: int, members: Sequence[str], inputs: _Inputs) -> None:
        self.owner, self.options = owner, owner.options
        self.walk, self.index, self.block = walk, index, walk.blocks[index]
        self.members, self.sample, self.products = members, inputs.sample, inputs.products
        self.weights = [weight_matrix(self.block.get_submodule(name)).float() for name in members]

    def quantize(self, schemes: Mapping[str, WeightScheme], found: dict[str, QuantizedWeight]) -> None:
        """Put the quantized weights of the members into `found`, and update that of a linear that absorbs the scale."""
        scaling = self._scaling([schemes[name] for name in self.members], found)
        self.owner.scalings.append(scaling)
        scale = torch.ones_like(self.sample.magnitude) if scaling.scale is None else scaling.scale
        for name, weight in zip(self.members, self.weights, strict=True):
            with named(self.walk.full_name(self.index, name)):
                found[name] = self._rounded(weight * scale, schemes[name], scale)
            set_weight(self.block.get_submodule(name), dequantize(found[name]))

    def _rounded(self, weight: torch.Tensor, scheme: WeightScheme, scale: torch.Tensor) -> QuantizedWeight:
        """The quantized `weight` ``[N, K]``, whose inputs are divided by `scale`."""
        if self.products is None:
            cut = clipped(weight, scheme, self.sample.vectors / scale, self.options)
            return rtn(cut, scheme, self.options.scale_dtype)
        hessian, shift = (each / scale / scale.unsqueeze(1) for each in (self.products.hessian, self.products.shift))
        return quantize_weight(weight, hessian, scheme, self.options.gptq, shift)

    def _scaling(self, schemes: list[WeightScheme], found: dict[str, QuantizedWeight]) -> Scaling:
        names = tuple(self.walk.full_name(self.index, name) for name in self.members)
        absorber = self._absorber(found) if self.options.alpha_steps else None
        if absorber is None:
            logger.info("AWQ: %s: no module before it can absorb a scale; it is only clipped", ", ".join(names))
            return Scaling(names)
        magnitude = _mean_by_source(self.sample.magnitude, absorber)
        search = search_scale(self.weights, schemes, self.sample.vectors, magnitude, self.options.alpha_steps)
        if search.alpha == 0:
            return Scaling(names, search=search)
        factor = torch.ones(absorber.width, dtype=torch.float32)
        used = absorber.sources >= 0
        factor[absorber.sources[used]] = 1 / search.scale[used]
        absorb = partial(self._divide_linear, found=found) if absorber.name in found else self._multiply_norm
        factor = absorb(absorber.name, factor)
        if factor is None:
            return Scaling(names, search=search)
        scale = torch.where(used, 1 / factor[absorber.sources], 1.0)
        return Scaling(names, self.walk.full_name(self.index, absorber.name), scale, factor, search)

    def _absorber(self, found: Mapping[str, QuantizedWeight]) -> Absorber | None:
        norms = [name for name, module in self.block.named_modules() if is_norm(module)]
        candidates = (*reversed(norms), *reversed(found))
        batch = self.walk.reached(self.index)[0]
        candidates = [name for name in candidates if not self.owner.is_shared(self.block.get_submodule(name))]
        return find_absorber(self.block, lambda: self.walk.run(self.index, batch), self.members, candidates)

    def _divide_linear(self, name: str, factor: torch.Tensor, found: dict[str, QuantizedWeight]) -> torch.Tensor | None:
        """Multiply the output channels of a quantized linear through its row scales and bias; its codes stay.

        Returns the factor, None if scales cannot hold it.
        """
        linear = self.block.get_submodule(name)
        try:
            scales = round_scales(found[name].scales * factor.unsqueeze(1), self.owner.scale_dtype)
        except ValueError:
            return None
        found[name] = replace(found[name], scales=scales)
        set_weight(linear, dequantize(found[name]))
        if linear.bias is not None:
            self._set_parameter(name, "bias", (linear.bias.float() * factor).to(linear.bias.dtype))
        return factor

    def _multiply_norm(self, name: str, factor: torch.Tensor) -> torch.Tensor | None:
        """Multiply a norm's output by `factor`; return the factor as the norm's dtype rounds it, None if impossible."""
        norm = self.block.get_submodule(name)
        for offset in _NORM_OFFSETS:
            vectors = scaled_vectors(norm, factor, offset)
            if vectors is None:
                continue
            gain, scaled = norm.weight.float() + offset, vectors["weight"].float() + offset
            rounded = torch.where(gain == 0, factor, scaled / gain)
            if torch.isfinite(rounded).all() and (rounded > 0).all():
                for key, vector in vectors.items():
                    self._set_parameter(name, key, vector)
                return rounded
        return None

    def _set_parameter(self, module: str, key: str, value: torch.Tensor) -> None:
        getattr(self.block.get_submodule(module), key).data = value
        self.owner.parameters[self.walk.full_name(self.index, f"{module}.{key}")] = value


def _mean_by_source(magnitude: torch.Tensor, absorber: Absorber) -> torch.Tensor:
    """Mean of `magnitude` over the input channels with the same source channel; 0 for channels without a source."""
    used = absorber.sources >= 0
    sources = absorber.sources[used]
    sums = torch.zeros(absorber.width, dtype=torch.float32).index_add_(0, sources, magnitude[used])
    counts = torch.zeros(absorber.width, dtype=torch.float32).index_add_(
        0, sources, torch.ones(len(sources), dtype=torch.float32)
    )
    mean = torch.zeros_like(magnitude)
    mean[used] = (sums / counts.clamp(min=1))[sources]
    return mean
