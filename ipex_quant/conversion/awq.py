"""`ipex_quant.quantization.awq`: quantize the weights of a float model with AWQ."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.ao.quantization import QConfigMapping

from ..nn.linears import is_linear
from ..woq.awq import AwqOptions
from ..woq.awq_blocks import awq_blocks
from .calibration_batches import Samples, calibration_batches
from .found import FoundWeights
from .gptq import chosen_head, warn_of_rest
from .prepare import convert_some, prepare
from .rules import choose_weight_only
from .swap import with_split_attentions


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
    """Quantize the linear layers of `model` by `quantization_config`, using AWQ in transformer blocks.

    The result has `WeightOnlyQuantizedLinear` modules and is ready for inference, `llm.optimize` (without a
    `quantization_config`) and `llm.save`. All weight dtypes, group sizes and compute modes are supported. The norm or
    linear before a scaled layer is multiplied by the reciprocal of its scale; where there is none, the layer's range is
    only clipped, and the log (`ipex_quant`, INFO) says so. AWQ quantizes the blocks of all towers that the calibration
    reaches: encoder and decoder, vision and text. Other linears and experts in 3-D parameters are rounded to nearest,
    with a warning that names the linears. So is the head, unless `lm_head` has its range clipped by calibration.

    - `dataloader`, `nsamples`, `use_max_length` and `pad_max_length` are those of `gptq`.
    - `options` sets how AWQ searches, and with its `gptq`, how GPTQ rounds the scaled weights.
    - Without `inplace` the result is a copy and `model` is unchanged.

    Raises TypeError for a `quantization_config` that is no mapping, and ValueError for one that is not weight-only, a
    dataloader without usable samples, a model without transformer blocks or with none to quantize, and NaN or Inf in a
    weight or in the input of a layer, which it names. `model` is then unchanged.
    """
    walked = with_split_attentions(model)
    chosen = choose_weight_only(quantization_config, walked, "AWQ")
    also = chosen_head(model, lm_head)
    batches = calibration_batches(model, dataloader, Samples(nsamples, pad_max_length, use_max_length))
    found = awq_blocks(walked, batches, {name: qconfig.scheme for name, qconfig in chosen.items()}.get, options, also)
    rest = [name for name in chosen if is_linear(walked.get_submodule(name)) and name not in found.weights]
    warn_of_rest(walked, rest, "awq: these linear layers are rounded to nearest")

    model = prepare(model, quantization_config, inplace=inplace)
    FoundWeights(found.weights, found.parameters).put_into(model)
    return convert_some(model, inplace=True)
