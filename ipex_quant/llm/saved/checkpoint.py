"""`apply_checkpoint`: load the quantized layers and the other tensors of a low-precision checkpoint into a model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import nn
from torch.ao.quantization import QConfigMapping

from ...checkpoints import AwqFormat, Checkpoint, Stored, WeightsInMemory
from ...conversion.prepare import FLOAT_REASONS, check_any_quantized, warn_of_float
from ...conversion.rules import choose_qconfigs, fit_reasons
from ...conversion.swap import copy_on_write, swap_modules
from ...conversion.tidy import leave_fast_paths
from ...conversion.tying import untie
from ...nn import Int8Linear, WeightOnlyQuantizedLinear
from ...nn.embeddings import is_embedding
from ...nn.fused_forward import restore_forwards
from ...nn.input_factor import InputFactor
from ...nn.linears import is_linear, linear_shape
from ...nn.multihead_attention import split_attentions
from ...numerics.scheme import QConfigWoq
from ...ops.int8 import INT8_PER_CHANNEL
from .checkpoint_embeddings import embeddings_from_checkpoint
from .checkpoint_experts import experts_from_checkpoint, module_of, stack_float_experts
from .checkpoint_names import with_model_names


def apply_checkpoint(
    model: nn.Module, checkpoint: Checkpoint | WeightsInMemory, mapping: QConfigMapping, inplace: bool
) -> nn.Module:
    """Replace layers of `model` by the quantized ones in `checkpoint`, one at a time, and load its other tensors.

    `mapping` selects the layers and their compute mode; the checkpoint says how they are quantized. A layer that it
    does not hold keeps its float weight and bias; a layer without a bias in the checkpoint keeps the float bias. Float
    weights may be on the meta device if the checkpoint has them. Experts that `model` stacks in one parameter may be
    single linear layers in the checkpoint, with any names that transformers knows. Raises ValueError for layers that
    `model` does not have, a tensor that is missing or does not fit, and parameters that are left without values.
    """
    plan = plan_of(model, checkpoint, mapping)
    model = model if inplace else copy_on_write(model)
    restore_forwards(model)
    model = split_attentions(model, plan.layers)
    untie(model, plan.replacements)
    swap_modules(model, plan.replacements)
    plan.finish(model)
    _load_others(model, stack_float_experts(model, plan.checkpoint.other_tensors()))
    return model


@dataclass(frozen=True)
class Plan:
    """Which layers of a model get the weights of a checkpoint, and how.

    - `checkpoint` has the model's names.
    - `replacements` maps names of layers to functions that make their successors of the old ones.
    - `reasons` says why other layers stay in float, `left` that the checkpoint does not hold them.
    """

    checkpoint: Checkpoint | WeightsInMemory
    replacements: Mapping[str, Callable[[nn.Module], nn.Module]]
    reasons: dict[str, str]
    left: dict[str, str]

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each layer in the checkpoint."""
        return {name: self.checkpoint.nbytes(name) for name in self.replacements}

    @property
    def layers(self) -> set[str]:
        """Names of the layers that are replaced."""
        return set(self.replacements)

    def finish(self, model: nn.Module) -> None:
        """Note why layers of `model` stay in float, once the others are replaced; ValueError if all do."""
        setattr(model, FLOAT_REASONS, fit_reasons(self.reasons | self.left, model))
        leave_fast_paths(model, self.layers)
        if len(self.checkpoint):
            check_any_quantized(model)
        warn_of_float(model, self.reasons)
        _check_scaled_activations(model, self.checkpoint)


def plan_of(model: nn.Module, checkpoint: Checkpoint | WeightsInMemory, mapping: QConfigMapping) -> Plan:
    """The `Plan` for `model`, whose weights are not read; raises ValueError as `apply_checkpoint` does."""
    chosen, reasons = choose_qconfigs(mapping, model, read_weights=False)
    chosen = {name: qconfig for name, qconfig in chosen.items() if not is_embedding(model.get_submodule(name))}
    if not all(isinstance(qconfig, QConfigWoq) for qconfig in chosen.values()):
        raise ValueError("low_precision_checkpoint: it goes with a weight-only quantization_config")
    checkpoint = with_model_names(model, checkpoint)
    stored = {module_of(name) for name in checkpoint}
    replacements = embeddings_from_checkpoint(model, checkpoint, chosen, stored)
    _check_stored(stored - replacements.keys(), chosen, reasons, model)
    for name, qconfig in chosen.items():
        if name not in replacements and (name in stored or checkpoint.holds(name)):
            replacements[name] = partial(_from_checkpoint, checkpoint, name, qconfig)
    left = {name: "it is not quantized in the checkpoint" for name in chosen if name not in replacements}
    return Plan(checkpoint, replacements, fit_reasons(reasons, model), left)


def _check_stored(stored: set[str], chosen: dict[str, QConfigWoq], reasons: dict[str, str], model: nn.Module) -> None:
    unused = sorted(stored - chosen.keys() - reasons.keys())
    if unused:
        linears = [name for name, module in model.named_modules() if is_linear(module)]
        raise ValueError(
            f"low_precision_checkpoint: the model has no place for {len(unused)} of {len(stored)} quantized layers, "
            f"first {unused[:3]}; linear layers of the model are {linears[:3]}, ..."
        )


def _from_checkpoint(
    checkpoint: Checkpoint | WeightsInMemory, name: str, qconfig: QConfigWoq, module: nn.Module
) -> nn.Module:
    if not is_linear(module):
        return experts_from_checkpoint(checkpoint, name, qconfig, module)
    out_features, in_features = linear_shape(module)
    found = checkpoint.quantized_weight(name, in_features, out_features)
    if found is None:
        return module  # the checkpoint's own rules leave it in float
    weight, bias = found
    bias = module.bias if bias is None else bias
    if bias is not None and bias.device.type == "meta":
        raise ValueError(f"{name}.bias: missing, the checkpoint has only the weight; get a complete one")
    int8_input = checkpoint.int8_input(name) if weight.scheme == INT8_PER_CHANNEL else None
    if int8_input is not None:
        (new,) = Int8Linear.make_group([weight], [bias], int8_input.static, module.weight.dtype)
        return new
    new = WeightOnlyQuantizedLinear.from_quantized_weight(weight, bias, qconfig.lowp_mode, qconfig.act_quant_mode)
    factor = checkpoint.input_factor(name, in_features)
    if factor is not None:
        module.register_forward_pre_hook(InputFactor(factor))  # a successor takes over the hooks
    return new.to(module.weight.dtype)


def _check_scaled_activations(model: nn.Module, checkpoint: Checkpoint | WeightsInMemory) -> None:
    """Raise ValueError for scales of activation functions, which AWQ stores where no norm or linear can absorb them."""
    if isinstance(checkpoint, WeightsInMemory) or not isinstance(checkpoint.format, AwqFormat):
        return
    names = {name for name, _ in model.named_parameters()}
    scaled = [name for name in checkpoint.other_tensors() if name.endswith(".scales") and name not in names]
    if scaled:
        raise ValueError(
            f"low_precision_checkpoint: it divides the outputs of {len(scaled)} activation functions by scales (first "
            f"{scaled[0]}), which is not supported; quantize the model with ipex_quant.quantization.awq instead"
        )


def _load_others(model: nn.Module, tensors: Mapping[str, Stored]) -> None:
    places = {name: None for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())}
    unknown = []
    for name, tensor in tensors.items():
        if name not in places:
            unknown.append(name)
            continue
        path, _, key = name.rpartition(".")
        owner = model.get_submodule(path)
        old = getattr(owner, key)
        if old.shape != tensor.shape:
            raise ValueError(f"{name}: expected shape {list(old.shape)}, the checkpoint has {list(tensor.shape)}")
        if old.device.type == "meta":
            new = tensor[...].to(old.dtype, copy=True)
            setattr(owner, key, nn.Parameter(new, False) if key in owner._parameters else new)
        else:
            old.data.copy_(tensor[...])
    if unknown:
        warnings.warn(
            f"the model has no place for {len(unknown)} tensors of the checkpoint: {unknown[:5]}", stacklevel=4
        )
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    empty = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.device.type == "meta"]
    if empty:
        raise ValueError(f"neither the model nor the checkpoint has values for {len(empty)} tensors: {empty[:5]}")
