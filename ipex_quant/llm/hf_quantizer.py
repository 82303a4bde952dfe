"""The quantization method ``ipex_quant`` of transformers: `config.json` entry, and loading without float weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..nn import WeightOnlyQuantizedLinear
from ..nn.linears import FLOAT_DTYPES, is_linear, weight_matrix
from ..numerics.quantized_weight import CODE_DTYPES, QuantizedWeight, code_columns
from ..numerics.scheme import WeightScheme, WoqActQuantMode, WoqLowpMode, WoqWeightDtype
from ..quantization._description import METHOD, VERSION, describe
from ..quantization._tying import untie

_ENTRY_KEYS = {"weight_dtype", "symmetric", "group_size", "act_order", "bias", "lowp_mode", "act_quant_mode"}

_AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")
"""Values of `device_map` that leave the choice to the library."""

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES}


class IpexQuantConfig(QuantizationConfigMixin):
    """Entry `quantization_config` of a saved model's config.json.

    `modules` maps the name of each quantized module to its scheme and compute mode; `dtype` is the one of everything
    else. Raises ValueError for another version, or an entry that is not what `describe` writes.
    """

    def __init__(self, modules: Any = None, dtype: Any = None, version: Any = None, **others: Any) -> None:
        if version != VERSION:
            raise ValueError(f"quantization_config.version: expected {VERSION}, got {version!r}; update ipex_quant")
        if dtype not in _DTYPES:
            raise ValueError(f"quantization_config.dtype: expected one of {list(_DTYPES)}, got {dtype!r}")
        if not isinstance(modules, dict):
            raise ValueError(f"quantization_config.modules: expected names with entries, got {modules!r}")
        for name, entry in modules.items():
            if not isinstance(entry, dict) or entry.keys() != _ENTRY_KEYS:
                raise ValueError(f"quantization_config: {name}: expected {sorted(_ENTRY_KEYS)}, got {entry!r}")
        self.quant_method = METHOD
        self.version = version
        self.dtype = dtype
        self.modules = modules

    @property
    def torch_dtype(self) -> torch.dtype:
        return _DTYPES[self.dtype]


def attach(model: PreTrainedModel) -> None:
    """Make transformers know that `model` is quantized, so that `save_pretrained` describes it as it is by then."""
    model.config.quantization_config = describe(model)
    model.hf_quantizer = IpexQuantizer(IpexQuantConfig(**model.config.quantization_config), pre_quantized=True)


class IpexQuantizer(HfQuantizer):
    """Loads what `describe` describes: plain tensors, each packed as soon as all are read."""

    requires_calibration = False
    quantization_config: IpexQuantConfig

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise ValueError("from_pretrained does not quantize with ipex_quant; use ipex_quant.llm.optimize")
        if device_map in _AUTOMATIC:
            return
        devices = device_map.values() if isinstance(device_map, dict) else [device_map]
        if any(torch.device(device).type != "cpu" for device in devices if device is not None):
            raise ValueError(f"device_map: ipex_quant models run on the cpu, got {device_map!r}")

    def update_device_map(self, device_map: Any) -> Any:
        return {"": "cpu"} if device_map in _AUTOMATIC else device_map

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        return self.quantization_config.torch_dtype

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> None:
        """Every tensor keeps the dtype it was saved in, so that the loaded model computes what the saved one did."""

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        model.config.quantization_config = describe(model)  # modules and dtypes may have changed since
        return None, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        entries = self.quantization_config.modules
        untie(model, entries)
        for name, entry in entries.items():
            module = _PlainLinear(_linear(model, name), entry)
            model.set_submodule(name, module)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name in self.quantization_config.modules:
            plain = model.get_submodule(name)
            try:
                packed = plain.pack()
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name}: {error}") from error
            model.set_submodule(name, packed.to(self.quantization_config.torch_dtype))
        model.config.quantization_config = self.quantization_config.to_dict()
        return model


def register() -> None:
    """Make the method known to transformers; once is enough, a second time does nothing."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(IpexQuantConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(IpexQuantizer)


class _PlainLinear(nn.Module):
    """Where transformers loads the plain tensors of one quantized linear to."""

    def __init__(self, linear: nn.Module, entry: dict[str, Any]) -> None:
        super().__init__()
        self.shape = tuple(weight_matrix(linear).shape)
        self.scheme = WeightScheme(
            _member(WoqWeightDtype, entry["weight_dtype"]), entry["symmetric"], entry["group_size"]
        )
        self.modes = _member(WoqLowpMode, entry["lowp_mode"]), _member(WoqActQuantMode, entry["act_quant_mode"])
        if self.modes == (WoqLowpMode.INT8, WoqActQuantMode.NONE):
            raise ValueError("quantization_config: lowp_mode int8 quantizes activations, got act_quant_mode none")
        rows, columns = self.shape
        grid = (rows, self.scheme.group_count(columns))
        kinds = {
            "codes": (CODE_DTYPES[self.scheme.dtype], (rows, code_columns(self.scheme.dtype, columns))),
            "scales": (torch.float32, grid),
            "zero_points": None if self.scheme.symmetric else (torch.int16, grid),
            "g_idx": (torch.int32, (columns,)) if entry["act_order"] else None,
            "bias": (torch.float32, (rows,)) if entry["bias"] else None,
        }
        for name, kind in kinds.items():
            tensor = None if kind is None else torch.empty(kind[1], dtype=kind[0], device="meta")
            self.register_buffer(name, tensor)

    @property
    def weight(self) -> torch.Tensor:
        # Initializers of some models reach for the weights of their children; this one takes whatever they write.
        return torch.empty(self.shape, device="meta")

    def pack(self) -> WeightOnlyQuantizedLinear:
        missing = [name for name, tensor in self.named_buffers() if not getattr(tensor, "_is_hf_initialized", False)]
        if missing:
            raise ValueError(f"{', '.join(missing)}: missing in the checkpoint, or of another shape")
        qw = QuantizedWeight(self.codes, self.scales, self.zero_points, self.g_idx, self.scheme, self.shape)
        return WeightOnlyQuantizedLinear.from_quantized_weight(qw, self.bias, *self.modes)


def _linear(model: nn.Module, name: str) -> nn.Module:
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"quantization_config: the model has no module {name!r}") from error
    if not is_linear(module):
        raise ValueError(f"quantization_config: {name} is a {type(module).__name__}, no linear layer")
    return module


def _member(enum: Any, name: str) -> Any:
    names = {member.name.lower(): member for member in enum}
    if name not in names:
        raise ValueError(f"quantization_config: expected one of {list(names)}, got {name!r}")
    return names[name]
