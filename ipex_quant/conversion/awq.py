"""`ipex_quant.quantization.awq`: quantize the weights of a float model with AWQ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import nn
from torch.ao.quantization import QConfigMapping

from ..nn import WeightOnlyQuantizedLinear
from ..nn.linears import is_linear, weight_matrix
from ..numerics.quantized_weight import QuantizedWeight
from ..numerics.scheme import WeightScheme, WoqWeightQScheme
from ..woq.awq import AwqOptions
from ..woq.awq_blocks import awq_blocks
from .calibration_batches import MAIN_INPUT, calibration_batches
from .gptq import chosen_head, warn_of_rest
from .prepare import convert_some, prepare
from .qconfig import QConfigWoq
from .rules import choose_qconfigs
from .swap import swap_modules, with_split_attentions
from .tying import untie


def awq(
    model: nn.Module,
    dataloader: Iterable[object],
    quantization_config: QConfigMapping,
    options: AwqOptions | None = None,
    nsamples: int = 128,
    use_max_length: bool = False,
    pad_max_length: int = 2048,
    inplace: bool = False,
    lm_head: bool = False,
) -> nn.Module:
    """Quantize the linear layers of `model` as `quantization_config` says, those in transformer blocks with AWQ.

    The result has `WeightOnlyQuantizedLinear` modules, computes right away, and goes through `llm.optimize` (without a
    `quantization_config`) and `llm.save`. All weight dtypes, group sizes and compute modes will do. Norms and linears
    before a scaled layer take the reciprocal of its scale; where none can, the layer's range is clipped only, which the
    log (`ipex_quant`, INFO) tells. Blocks are those of all towers that the calibration reaches: encoder and decoder,
    vision and text. Other linears and experts in 3-D parameters are rounded to nearest, with a warning that names the
    linears; so is the head, unless `lm_head` asks to have it clipped by what calibration saw.

    - `dataloader`, `nsamples`, `use_max_length` and `pad_max_length` are those of `gptq`.
    - `options` say how AWQ searches.
    - Without `inplace` the result is a copy and `model` is unchanged.

    Raises TypeError for a `quantization_config` that is no mapping, ValueError for one that is not weight-only, a
    dataloader without usable samples, a model without transformer blocks or with none to quantize, and NaN or Inf in a
    weight or in the input of a layer, naming it. Nothing is changed by then.
    """
    if not isinstance(quantization_config, QConfigMapping):
        raise TypeError(f"quantization_config: expected a QConfigMapping, got {type(quantization_config).__name__}")
    chosen, _ = choose_qconfigs(quantization_config, model)
    walked = with_split_attentions(model)
    for name, qconfig in chosen.items():
        if not isinstance(qconfig, QConfigWoq):
            raise ValueError(
                f"quantization_config: AWQ quantizes weights only, use get_weight_only_quant_qconfig_mapping; {name} "
                f"has a {type(qconfig).__name__}"
            )
        linear = walked.get_submodule(name)
        if is_linear(linear) and not torch.isfinite(weight_matrix(linear)).all():
            raise ValueError(f"{name}: weight: expected finite values, got NaN or Inf")
    also = chosen_head(model, lm_head)
    main_input = getattr(model, "main_input_name", MAIN_INPUT)
    batches = calibration_batches(dataloader, nsamples, pad_max_length, use_max_length, main_input)
    found = awq_blocks(walked, batches, partial(_scheme_of, chosen), options, also)
    rest = [name for name in chosen if is_linear(walked.get_submodule(name)) and name not in found.weights]
    warn_of_rest(walked, rest, "awq: these linear layers are rounded to nearest")

    model = prepare(model, quantization_config, inplace=inplace)
    for name, value in found.parameters.items():
        path, _, key = name.rpartition(".")
        owner = model.get_submodule(path)
        setattr(owner, key, nn.Parameter(value, owner._parameters[key].requires_grad))
    untie(model, found.weights)
    swap_modules(model, {name: partial(_quantized, weight) for name, weight in found.weights.items()})
    return convert_some(model, inplace=True)


def _scheme_of(qconfigs: Mapping[str, QConfigWoq], name: str) -> WeightScheme | None:
    qconfig = qconfigs.get(name)
    if qconfig is None:
        return None
    return WeightScheme(qconfig.weight_dtype, qconfig.weight_qscheme == WoqWeightQScheme.SYMMETRIC, qconfig.group_size)


def _quantized(weight: QuantizedWeight, linear: nn.Module) -> nn.Module:
    qconfig = linear.qconfig
    bias = linear.bias if linear.bias is not None and linear.bias.any() else None
    new = WeightOnlyQuantizedLinear.from_quantized_weight(weight, bias, qconfig.lowp_mode, qconfig.act_quant_mode)
    return new.to(linear.weight.dtype)
