"""The quantization method ``ipex_quant`` for transformers: its config.json entry, and loading without float weights."""

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

from ...conversion.description import KINDS, METHOD, VERSION, describe, tied_groups
from ...conversion.resizing import watch_head
from ...conversion.tidy import leave_fast_paths
from ...conversion.tying import share_tables, untie
from ...nn import (
    Int8Conv,
    Int8Linear,
    Int8Recurrent,
    Int8RecurrentCell,
    Placeholder,
    QuantizedEmbedding,
    WeightOnlyQuantizedLinear,
)
from ...nn.input_factor import scaled_layers
from ...nn.multihead_attention import named_layers, split_attentions
from ...nn.weight_only_linear import OPTIONAL_ENTRY, SCHEME_ENTRY
from ...numerics.scheme import FLOAT_DTYPES
from ..attention import NAME as NATIVE_ATTENTION
from ..casting import cast_float
from ..dequantize import dequantize_model
from ..native import native_stack, use_native_stack
from .mark import mark_what_is_saved, unmark
from .notes import check_note, note_recipe, recipe_note
from .parallel import divide, ranks_of, refuse_parts, take_plan

_AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")
"""Values of `device_map` that let the library choose the device."""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_DTYPES = {_name(dtype): dtype for dtype in FLOAT_DTYPES}
_CACHE_DTYPES = _DTYPES | {"int8": torch.int8}


class IpexQuantConfig(QuantizationConfigMixin):
    """Entry `quantization_config` of a saved model's config.json.

    - `modules` maps the name of each quantized module to its description by its class.
    - `dtype` is the dtype of all other modules.
    - `share_groups` lists groups of names of INT8 linears that have one packed weight.
    - `tied` lists groups of names of embeddings, and last an output layer, that have one packed weight; the first of a
      group saves it.
    - `native` says that attention, norms and caches are native, as after ``llm.optimize``, with `kv_cache_dtype`.
    - `recipe` notes the recipe that made the model.

    Raises ValueError for another version, or an entry that `describe_model` does not write.
    """

    def __init__(
        self,
        modules: Any = None,
        dtype: Any = None,
        version: Any = None,
        share_groups: Any = (),
        native: Any = False,
        kv_cache_dtype: Any = None,
        recipe: Any = None,
        tied: Any = (),
        **others: Any,
    ) -> None:
        if version != VERSION:
            raise ValueError(f"quantization_config.version: expected {VERSION}, got {version!r}; update ipex_quant")
        if dtype not in _DTYPES:
            raise ValueError(f"quantization_config.dtype: expected one of {list(_DTYPES)}, got {dtype!r}")
        if not isinstance(modules, dict):
            raise ValueError(f"quantization_config.modules: expected names with entries, got {modules!r}")
        for name, entry in modules.items():
            _check_entry(name, entry)
        _check_groups(share_groups, modules)
        _check_ties(tied, modules)
        if not isinstance(native, bool):
            raise ValueError(f"quantization_config.native: expected true or false, got {native!r}")
        if kv_cache_dtype not in (None, *_CACHE_DTYPES):
            raise ValueError(
                f"quantization_config.kv_cache_dtype: expected null or one of {list(_CACHE_DTYPES)}, "
                f"got {kv_cache_dtype!r}"
            )
        self.quant_method = METHOD
        self.version = version
        self.dtype = dtype
        self.modules = modules
        self.share_groups = list(share_groups)
        self.native = native
        self.kv_cache_dtype = kv_cache_dtype
        self.recipe = check_note(recipe)
        self.tied = list(tied)

    @property
    def torch_dtype(self) -> torch.dtype:
        return _DTYPES[self.dtype]


def describe_model(model: PreTrainedModel) -> dict[str, Any]:
    """`describe`, with the native stack and the recipe; a dtype in ``model.config.kv_cache_dtype`` becomes its name."""
    native, dtype = native_stack(model)
    cache_dtype = getattr(model.config, "kv_cache_dtype", None)
    if isinstance(cache_dtype, torch.dtype):
        model.config.kv_cache_dtype = _name(cache_dtype)  # transformers cannot write a dtype to JSON
    stack = {"native": native, "kv_cache_dtype": None if dtype is None else _name(dtype)}
    return {**describe(model), **stack, "recipe": recipe_note(model)}


def attach(model: PreTrainedModel) -> None:
    """Register `model` as quantized with transformers, so that `save_pretrained` writes its current description."""
    model.config.quantization_config = describe_model(model)
    model.hf_quantizer = IpexQuantizer(IpexQuantConfig(**model.config.quantization_config), pre_quantized=True)
    mark_what_is_saved(model)
    watch_head(model)


class IpexQuantizer(HfQuantizer):
    """Loads the quantized modules that `describe` describes: their plain tensors are read, then packed.

    All other modules get the dtype that `from_pretrained` was asked for (by default the saved one), and the attention
    that it was asked for (by default the native one, if the saved model had it).
    """

    requires_calibration = False
    native_attention = True
    parallel_plan: dict[str, str] | None = None
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
        if dtype is None:
            return self.quantization_config.torch_dtype
        if dtype not in FLOAT_DTYPES:
            raise ValueError(f"dtype: expected 'auto' or one of {list(_DTYPES)}, got {dtype}")
        return dtype

    def update_attn_implementation(self, config: Any) -> Any:
        unmark(config)  # before transformers looks for the files
        parts = [config, *(getattr(config, key, None) for key in config.sub_configs)]
        asked = {part._attn_implementation for part in parts if part is not None}
        self.native_attention = asked <= {None, NATIVE_ATTENTION}
        if config.dtype is None:  # from AutoModel with dtype=None; "auto" would take the dtype of a scale
            config.dtype = self.quantization_config.torch_dtype
        return config

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> None:
        """Return None: tensors are read in their saved dtype, and float ones cast after the modules are packed."""

    def update_parallel_plan(self, model: PreTrainedModel, plan: dict[str, str]) -> None:
        if plan is model.tp_plan:
            self.parallel_plan = take_plan(model)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Any] | None, dict[str, str]]:
        refuse_parts(model, "save")
        scaled = scaled_layers(model)
        if scaled:
            raise ValueError(
                f"{len(scaled)} layers multiply their input by factors of the checkpoint they are from, which cannot "
                f"be saved: {scaled[:3]}; keep that checkpoint"
            )
        model.config.quantization_config = describe_model(model)  # modules and dtypes may have changed since
        followers = [name for group in tied_groups(model) for name in group[1:]]
        if not followers:
            return None, {}
        left_out = {f"{name}.{key}" for name in followers for key in QuantizedEmbedding.weight_names}
        return {key: tensor for key, tensor in model.state_dict().items() if key not in left_out}, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained: no gradient passes convolutions and recurrent layers in INT8."""
        opaque = (Int8Conv.kind, Int8Recurrent.kind, Int8RecurrentCell.kind)
        return all(entry["kind"] not in opaque for entry in self.quantization_config.modules.values())

    @property
    def is_compileable(self) -> bool:
        return True

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        refuse_parts(model, "dequantize")
        dtype = _DTYPES.get(dtype, dtype)  # saved configurations have its name
        return dequantize_model(model, model.dtype if dtype is None else dtype)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        entries = self._fit_names(model)
        split_attentions(model, entries)
        untie(model, entries)
        for name, entry in entries.items():
            model.set_submodule(name, _placeholder(model, name, entry))
        leave_fast_paths(model, entries)
        for owner, *followers in self.quantization_config.tied:
            for name in followers:
                model.get_submodule(name).borrow(QuantizedEmbedding.weight_names, model.get_submodule(owner))

    def _fit_names(self, model: PreTrainedModel) -> dict[str, Any]:
        """The entries by the names in `model`, which may be a base model or have another head than the saved model.

        As transformers does with tensors, it adds or removes the prefix of the base model, and leaves out modules of
        another head.
        """
        config = self.quantization_config
        present, prefix = {name for name, _ in named_layers(model)}, f"{model.base_model_prefix}."
        names = {name: _name_in(present, prefix, name) for name in config.modules}
        if type(model).__name__ in (model.config.architectures or [type(model).__name__]):
            names = {name: name if found is None else found for name, found in names.items()}  # each must be there
        config.modules = {names[name]: entry for name, entry in config.modules.items() if names[name] is not None}
        config.share_groups = _renamed(config.share_groups, names)
        config.tied = _renamed(config.tied, names)
        return config.modules

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if ranks_of(model) > 1 and self.parallel_plan is None:  # an older transformers did not ask for the plan
            raise ValueError(
                "tensor parallelism: quantized layers are not divided among processes by transformers; leave out "
                "distributed_config and tp_plan, or install transformers 5.23 or later"
            )
        config = self.quantization_config
        for name in config.modules:
            missing = model.get_submodule(name).missing
            if missing:
                raise ValueError(f"{name}: {', '.join(missing)}: missing in the checkpoint, or of another shape")
        grouped = {name for group in config.share_groups for name in group}
        singles = [[name] for name in config.modules if name not in grouped]
        for names in (*config.share_groups, *singles):
            loaded = [model.get_submodule(name) for name in names]
            try:
                modules = KINDS[config.modules[names[0]]["kind"]].from_placeholders(loaded)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{', '.join(names)}: {error}") from error
            for name, module in zip(names, modules, strict=True):
                model.set_submodule(name, module.to(config.torch_dtype))
        share_tables(model, config.tied)
        self._cast(model)
        if self.parallel_plan is not None:
            divide(model, self.parallel_plan)
        mark_what_is_saved(model)
        watch_head(model)
        model.config.quantization_config = self.quantization_config.to_dict()
        if config.recipe is not None:
            note_recipe(model, config.recipe)
        if config.native:
            use_native_stack(model, _CACHE_DTYPES.get(config.kv_cache_dtype), self.native_attention)
        return model

    def _cast(self, model: PreTrainedModel) -> None:
        """Cast `model` to the dtype that was asked for, unless that is the saved dtype.

        "auto" resolves to the dtype of the model's first parameter, which also counts as the saved dtype.
        """
        config, dtype = self.quantization_config, model.config.dtype
        if dtype in (config.torch_dtype, model.dtype):
            model.config.dtype = config.torch_dtype
        else:
            cast_float(model, dtype, config.torch_dtype)
            config.dtype = _name(dtype)


def register() -> None:
    """Register the quantization method with transformers; calling it again does nothing."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(IpexQuantConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(IpexQuantizer)


def _check_entry(name: str, entry: Any) -> None:
    """Raise ValueError unless `entry` names a kind of module and has the keys of that kind."""
    kind = entry.get("kind") if isinstance(entry, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"quantization_config: {name}: expected a kind of {list(KINDS)}, got {entry!r}")
    expected = {"kind"} | KINDS[kind].entry_names
    if not expected <= entry.keys() <= expected | KINDS[kind].optional_entry_names:
        raise ValueError(f"quantization_config: {name}: expected {sorted(expected)}, got {entry!r}")


def _check_groups(groups: Any, modules: dict[str, Any]) -> None:
    """Raise ValueError unless `groups` are lists of INT8 linears with the same input, each in one list at most."""
    if not isinstance(groups, (list, tuple)) or not all(isinstance(group, list) for group in groups):
        raise ValueError(f"quantization_config.share_groups: expected lists of names, got {groups!r}")
    names = [name for group in groups for name in group]
    if any(not isinstance(name, str) or modules.get(name, {}).get("kind") != Int8Linear.kind for name in names):
        raise ValueError(f"quantization_config.share_groups: expected names of INT8 linear layers, got {groups}")
    if len(set(names)) != len(names):
        raise ValueError(f"quantization_config.share_groups: expected each module once, got {groups}")
    for group in groups:
        inputs = [(modules[name]["activation"], modules[name]["smoothed"]) for name in group]
        if not inputs or any(each != inputs[0] for each in inputs):
            raise ValueError(f"quantization_config.share_groups: expected modules with the same input, got {group}")


def _check_ties(groups: Any, modules: dict[str, Any]) -> None:
    """Raise ValueError unless `groups` are lists of embeddings of one scheme; the last may be a linear layer."""
    if not isinstance(groups, (list, tuple)) or not all(isinstance(group, list) for group in groups):
        raise ValueError(f"quantization_config.tied: expected lists of names, got {groups!r}")
    names = [name for group in groups for name in group]
    if any(not isinstance(name, str) or name not in modules for name in names) or len(set(names)) != len(names):
        raise ValueError(f"quantization_config.tied: expected names of modules, each once, got {groups}")
    for group in groups:
        *kinds, last = [modules[name]["kind"] for name in group] or [None]
        alike = all(kind == QuantizedEmbedding.kind for kind in kinds)
        if not kinds or not alike or last not in (QuantizedEmbedding.kind, WeightOnlyQuantizedLinear.kind):
            raise ValueError(f"quantization_config.tied: expected embeddings, the last may be linear, got {group}")
        schemes = [[modules[name].get(key) for key in (*SCHEME_ENTRY, *OPTIONAL_ENTRY)] for name in group]
        if any(scheme != schemes[0] for scheme in schemes):
            raise ValueError(f"quantization_config.tied: expected modules of one scheme, got {group}")


def _renamed(groups: list[list[str]], names: dict[str, str | None]) -> list[list[str]]:
    """`groups` with the `names` in a model, without modules that it lacks and groups of fewer than two."""
    found = [[names[name] for name in group if names[name] is not None] for group in groups]
    return [group for group in found if len(group) > 1]


def _name_in(present: set[str], prefix: str, name: str) -> str | None:
    """The one of the names `present` that is `name` with or without the `prefix` of the base model, or None."""
    candidates = (name, name.removeprefix(prefix), prefix + name)
    return next((each for each in candidates if each in present), None)


def _placeholder(model: nn.Module, name: str, entry: dict[str, Any]) -> Placeholder:
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"quantization_config: the model has no module {name!r}") from error
    try:
        place = KINDS[entry["kind"]].placeholder(module, entry)
    except (TypeError, ValueError) as error:
        raise type(error)(f"quantization_config: {name}: {error}") from error
    place.stand_for(module)
    return place
