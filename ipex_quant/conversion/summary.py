"""The qconf summary: the parameters found by calibration, as JSON in IPEX's format.

``{parent: {"q_op_infos": {index: op}, "nonq_op_infos": ..., "layer_output_infos": ...}}`` with one op for each layer,
in the order of execution inside its parent module. Layers are matched by the name in their op. Ops that are no layers
to quantize here, such as the functional ones that IPEX writes, are kept as they were read.
"""

from __future__ import annotations

import copy
import json
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import ArgumentError
from ..nn.linears import is_linear, weight_matrix
from ..numerics.int8 import StaticActivation
from ..observers import describe_observer, has_data
from ..reading import read_json, shown
from ..smoothquant.tracing import SharedInput
from ..writing import write_whole
from .observed import LayerParameters, Observed, ObservedGroup, ObservedLayer, observed
from .parameters import group_parameters
from .qconfig import QConfigSmoothQuant

_ROOT = " "
_SEPARATOR = ":"
_CODES = {"torch.quint8": 0, "torch.qint8": 128}
"""Offset that makes the codes of an activation unsigned, by dtype."""


def save_qconf_summary(model: nn.Module, qconf_summary: str | os.PathLike) -> None:
    """Write the parameters that calibration of a prepared `model` found to the file `qconf_summary`.

    Entries of a loaded summary are written unchanged, except for layers that were calibrated since. Raises ValueError
    without a file name, RuntimeError if `model` is not prepared for static quantization or not calibrated.
    """
    if not qconf_summary:
        raise ArgumentError("A configure file name should be given to save the qconf_summary")
    observations = observed(model)
    if not observations.observers():
        raise RuntimeError("save_qconf_summary: dynamic quantization has nothing to save; convert needs no calibration")
    if not any(group.has_data for group in observations.static_groups):
        raise RuntimeError("save_qconf_summary: not calibrated; run batches through the prepared model first")
    document = copy.deepcopy(observations.summary) or _skeleton(model, observations)
    ops = {op["fqn"]: (index, op) for index, op in _module_ops(document)}
    for group in observations.static_groups:
        parameters = group_parameters(model, group)
        assigned = observations.summary is None and None not in parameters
        if assigned or has_data(group.observer):
            _write_group([ops[layer.name] for layer in group.layers], group, parameters)
        for layer in group.layers if observations.summary is None else ():
            if not layer.quantized:
                _leave_in_float(ops[layer.name][1])
    write_whole(qconf_summary, json.dumps(document, indent=4))


def load_qconf_summary(model: nn.Module, qconf_summary: str | os.PathLike) -> None:
    """Load the parameters of a prepared `model` from a file that `save_qconf_summary`, or IPEX, wrote.

    Earlier statistics are dropped; later calibration replaces the parameters of the layers that it reaches. A layer
    whose input has the `force_dtype` torch.float32 stays in float. Raises OSError for a file that cannot be read, and
    ValueError for one that is no summary or belongs to another model; `model` is then unchanged.
    """
    observations = observed(model)
    document = read_summary(qconf_summary)
    static = observations.static_groups
    layers = _read_layers(document, model, {layer.name for group in static for layer in group.layers})
    for group in static:
        group.reset()
        for layer in group.layers:
            layer.quantized, layer.parameters = layers[layer.name]
    observations.summary = document


def read_summary(path: str | os.PathLike) -> dict[str, Any]:
    """The content of a summary file; OSError if it cannot be read, ValueError if it is no summary."""
    try:
        document = read_json(path)
        list(_module_ops(document))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: not a qconf summary ({error!r})") from error
    return document


def summary_groups(document: Mapping[str, Any], names: Collection[str]) -> list[SharedInput]:
    """Groups of the layers `names` that have one parent and, by the summary, the same input tensor.

    A layer that was called more than once is in no group. Raises ValueError for an entry without an input tensor.
    """
    calls = Counter(op["fqn"] for _, op in _module_ops(document))
    groups: dict[tuple[str, str], list[str]] = {}
    for _, op in _module_ops(document):
        name = op["fqn"]
        if name in names and calls[name] == 1:
            try:
                source = str(op["input_tensor_infos"][0]["id"])
            except (KeyError, TypeError, IndexError) as error:
                raise ValueError(f"qconf summary: {name}: its entry is malformed ({error!r})") from error
            groups.setdefault((name.rpartition(".")[0], source), []).append(name)
    return [SharedInput(tuple(members)) for members in groups.values()]


def _module_ops(document: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Index and content of every op that is a module."""
    for infos in document.values():
        for index, op in infos["q_op_infos"].items():
            if not isinstance(op["op_type_is_module"], bool):
                raise TypeError(f"op_type_is_module: expected true or false, got {shown(op['op_type_is_module'])}")
            if op["op_type_is_module"]:
                if not isinstance(op["fqn"], str):
                    raise TypeError(f"fqn: expected the name of a module, got {shown(op['fqn'])}")
                yield index, op


# ------------------------------------------------------------------------------------------------------------- writing
def _skeleton(model: nn.Module, observations: Observed) -> dict[str, Any]:
    """A summary of the observed layers without parameters."""
    document: dict[str, Any] = {}
    tensors = 0
    for group in observations.static_groups:
        source, tensors = tensors, tensors + 1
        for layer in group.layers:
            parent = layer.name.rpartition(".")[0].replace(".", _SEPARATOR) or _ROOT
            infos = document.setdefault(parent, {"q_op_infos": {}, "nonq_op_infos": {}, "layer_output_infos": []})
            ops = infos["q_op_infos"]
            ops[str(len(ops))] = _empty_op(model.get_submodule(layer.name), layer, group, (source, tensors))
            tensors += 1
    return document


def _empty_op(
    module: nn.Module, layer: ObservedLayer, group: ObservedGroup, tensors: tuple[int, int]
) -> dict[str, Any]:
    dtype = str(module.weight.dtype)
    source, result = tensors
    kind = next(cls for cls in type(module).__mro__ if cls.__module__.startswith(("torch.nn", "transformers.")))
    op = {
        "op_type": str(kind),
        "op_type_is_module": True,
        "fqn": layer.name,
        "input_tensor_infos": [{"id": source, "orig_dtype": dtype, "inf_dtype": dtype, "force_dtype": "torch.quint8"}],
        "weight_tensor_infos": [{"orig_dtype": dtype, "inf_dtype": "torch.qint8"}],
        "output_tensor_infos": [{"id": result, "orig_dtype": dtype, "inf_dtype": dtype}],
        "activation_observer": describe_observer(group.observer),
    }
    if isinstance(layer.qconfig, QConfigSmoothQuant):
        op["share_weight_observers"] = layer.qconfig.share_weight_observers
    op["weight_observer"] = describe_observer(layer.qconfig.weight())
    return op


def _write_group(
    ops: list[tuple[str, dict[str, Any]]], group: ObservedGroup, parameters: list[LayerParameters]
) -> None:
    smoothed = parameters[0].activation.smoothing_factor is not None
    shared = not smoothed or group.layers[0].qconfig.share_weight_observers
    keyed = {
        f"{index}_0": each.activation
        for (index, _), each in zip(ops[: 1 if shared else None], parameters, strict=False)
    }
    for (_, op), own in zip(ops, parameters, strict=True):
        source, weight = op["input_tensor_infos"][0], op["weight_tensor_infos"][0]
        shift = _CODES.get(source["force_dtype"], 0)
        for info in (source, weight):
            info.pop("smooth_quant_scaling_factor", None)
        if smoothed:
            source["scale"] = {key: [each.scale] for key, each in keyed.items()}
            source["zero_point"] = {key: [each.zero_point - shift] for key, each in keyed.items()}
            factors = {key: each.smoothing_factor for key, each in keyed.items()}
            source["smooth_quant_scaling_factor"] = {key: factor.tolist() for key, factor in factors.items()}
        else:
            source["scale"], source["zero_point"] = [own.activation.scale], [own.activation.zero_point - shift]
        weight["scale"] = own.weight_scales.tolist()
        weight["zero_point"] = [0] * len(own.weight_scales)
        if smoothed:
            weight["smooth_quant_scaling_factor"] = own.weight_factor.tolist()


def _leave_in_float(op: dict[str, Any]) -> None:
    for info in (*op["input_tensor_infos"], *op["weight_tensor_infos"]):
        info["inf_dtype"] = info["orig_dtype"]
    op["input_tensor_infos"][0]["force_dtype"] = "torch.float32"


# ------------------------------------------------------------------------------------------------------------- reading
def _read_layers(
    document: Mapping[str, Any], model: nn.Module, needed: set[str]
) -> dict[str, tuple[bool, LayerParameters | None]]:
    """Whether each layer of `needed` is quantized, and its parameters; ValueError unless the file fits `model`."""
    modules = dict(model.named_modules())
    ops = {op["fqn"]: (index, op) for index, op in _module_ops(document)}
    missing = sorted(needed - ops.keys())
    unknown = sorted(ops.keys() - modules.keys())
    if missing or unknown:
        raise ValueError(
            f"qconf summary: it belongs to another model: it lacks the layers {missing[:3]} and has {unknown[:3]} that "
            "the model lacks; leave layers out with the mapping's set_module_name(name, None), or calibrate again"
        )
    layers = {}
    for name in needed:
        index, op = ops[name]
        try:
            layers[name] = _read_layer(modules[name], index, op)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"qconf summary: {name}: its entry is malformed ({error!r})") from error
        except ValueError as error:
            raise ValueError(f"qconf summary: {name}: {error}") from error
    return layers


def _read_layer(module: nn.Module, index: str, op: Mapping[str, Any]) -> tuple[bool, LayerParameters | None]:
    source, weight = op["input_tensor_infos"][0], op["weight_tensor_infos"][0]
    dtype = source["force_dtype"]
    quantized = dtype in _CODES and weight["inf_dtype"] == "torch.qint8"
    if not quantized and "torch.float" not in dtype and "torch.bfloat16" not in dtype:
        raise ValueError(f"force_dtype: expected torch.quint8, torch.qint8 or a float dtype, got {shown(dtype)}")
    if not source.get("scale"):
        return quantized, None
    scale, zero_point = (_of_layer(source[key], index)[0] for key in ("scale", "zero_point"))
    if not isinstance(zero_point, int) or isinstance(zero_point, bool) or not _is_number(scale):
        raise ValueError(f"expected a scale and a whole zero point, got {shown(scale)} and {shown(zero_point)}")
    out_features, in_features = weight_matrix(module).shape if is_linear(module) else (len(module.weight), 0)
    factor = weight_factor = None
    if source.get("smooth_quant_scaling_factor"):
        factor = _vector(_of_layer(source["smooth_quant_scaling_factor"], index), "smoothing factor", in_features)
        weight_factor = _vector(weight["smooth_quant_scaling_factor"], "smoothing factor of the weight", in_features)
    scale = torch.tensor(scale, dtype=torch.float32).item()  # some write more digits than IPEX
    activation = StaticActivation(scale, zero_point + _CODES.get(dtype, 0), factor)
    scales = _vector(weight["scale"], "scale of the weight", out_features)
    return quantized, LayerParameters(activation, scales, weight_factor)


def _of_layer(value: Any, index: str) -> list[Any]:
    """The list for the op `index`: `value` itself, or the entry of the op in it, or else its first entry."""
    if isinstance(value, dict):
        value = value.get(f"{index}_0") or next(iter(value.values()), None)
    if not isinstance(value, list):
        raise TypeError(f"expected a list of numbers, got {shown(value)}")
    return value


def _vector(values: Any, name: str, length: int) -> torch.Tensor:
    if isinstance(values, list) and len(values) == length and all(map(_is_number, values)):
        vector = torch.tensor([float(value) for value in values], dtype=torch.float32)
        if bool((torch.isfinite(vector) & (vector > 0)).all()):
            return vector
    raise ValueError(f"{name}: expected {length} positive, finite values, got {shown(values)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not value > 1e300  # NaN is refused later
