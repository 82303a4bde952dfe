"""`dequantize_model`: replace quantized modules by the float modules of the model's class."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

from ..nn import Int8Recurrent, Int8RecurrentCell, QuantizedEmbedding, QuantizedModule, WeightOnlyQuantizedExperts
from ..nn.embeddings import row_factor
from ..nn.fused_forward import restore_forwards
from ..nn.linears import weight_matrix
from ..nn.multihead_attention import join_attentions, split_attentions
from ..nn.stacked_experts import set_expert_biases, set_expert_weights
from ..numerics import affine
from .native import attends_natively, native_stack, use_native_stack


def dequantize_model(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Replace every quantized module of `model` by a float module with the dequantized weight in `dtype`, in place.

    Native attention, caches and fused layers are set up again. Raises ValueError for a module that the model's class
    does not have.
    """
    native, cache_dtype = native_stack(model)
    attention = attends_natively(model)
    restore_forwards(model)
    config = copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)
    with torch.device("meta"):
        empty = type(model)(config)
    split_attentions(empty, [name for name, module in model.named_modules() if isinstance(module, QuantizedModule)])
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedModule):
            try:
                place = empty.get_submodule(name)
            except AttributeError:
                raise ValueError(f"dequantize: {type(model).__name__} has no module {name!r}") from None
            model.set_submodule(name, _float_module(module, place, dtype).train(module.training))
    join_attentions(model)
    model.to(dtype)
    if native:
        use_native_stack(model, cache_dtype, attention)
    return model


def _float_module(module: QuantizedModule, place: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The float module `place`, given on the meta device, with the dequantized weights of `module`."""
    place = place.to(dtype).to_empty(device="cpu").requires_grad_(False)
    if isinstance(module, WeightOnlyQuantizedExperts):
        for projection in ("gate_up", "down"):
            stack = module.quantized_stack(projection)
            weights = torch.stack([affine.dequantize(stack[expert], dtype) for expert in range(module.num_experts)])
            set_expert_weights(place, projection, weights)
            set_expert_biases(place, projection, module._buffers[f"_{projection}_bias"])
        return place
    if isinstance(module, (Int8Recurrent, Int8RecurrentCell)):
        for name, values in module.dequantized_parameters(dtype).items():
            getattr(place, name).copy_(values)
        return place
    if isinstance(module, QuantizedEmbedding):
        for key in place._buffers:  # the only buffer of a scaled embedding is its factor
            place._buffers[key] = torch.tensor(module.factor.value)
        if row_factor(place) != module.factor:
            return module.to(dtype).dequantize()
    weight = place.weight if isinstance(place, nn.Conv2d) else weight_matrix(place)
    weight.data.copy_(module.dequantized_weight(dtype))
    bias = module.bias
    if getattr(place, "bias", None) is not None:
        place.bias.data.zero_() if bias is None else place.bias.data.copy_(bias)
    elif bias is not None:
        place.bias = nn.Parameter(bias.detach().to(dtype, copy=True), requires_grad=False)
    return place
