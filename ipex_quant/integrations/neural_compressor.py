"""Algorithms for neural-compressor: static INT8 with SmoothQuant, and weight-only.

After `register()`, ``prepare``, ``convert``, ``quantize`` and ``autotune`` of ``neural_compressor.torch.quantization``
accept configurations of the two classes that it returns. Lists of values make a configuration a tuning space.
"""

# No postponed annotations: neural-compressor reads the annotations of a configuration's arguments.
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.ao.quantization import QConfigMapping

from .. import quantization
from ..autotune.calibration_pass import collect
from ..autotune.candidate import AUTO, Int8Candidate, WeightOnlyCandidate
from ..autotune.smoothquant_args import read_smoothquant_args
from ..autotune.space import ALGORITHMS
from ..autotune.static import StaticQuantizer
from ..autotune.weight_only import find_weights, quantized_model
from ..conversion.example import Example
from ..conversion.found import FoundWeights
from ..conversion.qconfig import DEFAULT_ACT_QUANT_MODE
from ..nn.linears import is_linear
from ..numerics.scheme import WeightScheme, WoqLowpMode, WoqWeightDtype
from ..quantization import convert, get_smooth_quant_qconfig_mapping, prepare

INT8_NAME = "ipex_quant_int8"
WEIGHT_ONLY_NAME = "ipex_quant_weight_only"


class Configs(NamedTuple):
    """The configuration classes that `register` makes."""

    int8: type
    weight_only: type


def register() -> Configs:
    """Register the algorithms with neural-compressor, by the names above; return their configuration classes.

    Raises ImportError without neural-compressor. Calling it again replaces the classes.
    """
    try:
        from neural_compressor.common.base_config import register_config
        from neural_compressor.common.utils import DEFAULT_WHITE_LIST, OP_NAME_OR_MODULE_TYPE
        from neural_compressor.torch.quantization.config import TorchBaseConfig
        from neural_compressor.torch.utils.utility import register_algo
    except ImportError as error:
        raise ImportError("expected neural-compressor; run `pip install ipex_quant[neural-compressor]`") from error

    class Common(TorchBaseConfig):
        """Base class of both configurations."""

        supported_configs = ()

        @classmethod
        def register_supported_configs(cls) -> None:
            """Do nothing; the base class requires this method."""

        @staticmethod
        def get_model_info(model: nn.Module, *_: Any) -> list:
            """Name and type of the layers that can be quantized."""
            return [(name, type(module).__name__) for name, module in model.named_modules() if is_linear(module)]

    class Int8Config(Common):
        """Static INT8: `alpha` is SmoothQuant's, a number in 0..1 or "auto"; None is without smoothing.

        `dtype` is int8, or fp32 for layers that stay in float.
        """

        name = INT8_NAME

        def __init__(
            self,
            alpha: float | str | None = 0.5,
            dtype: str = "int8",
            white_list: list[OP_NAME_OR_MODULE_TYPE] | None = DEFAULT_WHITE_LIST,
            **kwargs: Any,
        ) -> None:
            super().__init__(white_list=white_list)
            self.alpha = alpha
            self.dtype = dtype
            self._post_init()

        @classmethod
        def get_config_set_for_tuning(cls) -> "Int8Config":
            return cls(alpha=[AUTO, 0.5])

    class WeightOnlyConfig(Common):
        """Weight-only: `weight_dtype` names a `WoqWeightDtype` in small letters, or is fp32 for layers left in float.

        `algorithm` is rtn, gptq or awq; `lowp_mode`, the compute mode, is none, fp16, bf16 or int8.
        """

        name = WEIGHT_ONLY_NAME

        def __init__(
            self,
            weight_dtype: str = "int4",
            symmetric: bool = False,
            group_size: int = 128,
            algorithm: str = "rtn",
            lowp_mode: str = "int8",
            white_list: list[OP_NAME_OR_MODULE_TYPE] | None = DEFAULT_WHITE_LIST,
            **kwargs: Any,
        ) -> None:
            super().__init__(white_list=white_list)
            self.weight_dtype = weight_dtype
            self.symmetric = symmetric
            self.group_size = group_size
            self.algorithm = algorithm
            self.lowp_mode = lowp_mode
            self._post_init()

        @classmethod
        def get_config_set_for_tuning(cls) -> "WeightOnlyConfig":
            return cls(group_size=[128, 32], algorithm=["rtn", "gptq"])

    for config, algorithm in ((Int8Config, _int8), (WeightOnlyConfig, _weight_only)):
        register_config(framework_name="torch", algo_name=config.name)(config)
        register_algo(config.name)(algorithm)
    return Configs(Int8Config, WeightOnlyConfig)


def _int8(
    model: nn.Module,
    configs_mapping: dict,
    mode: Any,
    run_fn: Any = None,
    run_args: Any = None,
    example_inputs: Any = None,
    **_: Any,
) -> nn.Module:
    """Entry point of the INT8 algorithm for neural-compressor."""
    configs = _chosen(configs_mapping, INT8_NAME, "dtype")
    alphas = {name: config.alpha for name, config in configs.items()}
    if mode.value == "convert":
        return convert(model, inplace=True)
    if AUTO in alphas.values():
        if mode.value == "prepare" or set(alphas.values()) != {AUTO}:
            raise ValueError('alpha: "auto" needs quantize or autotune, and is for all layers or none')
        return _auto_int8(model, alphas, _calibration(run_fn, run_args), example_inputs)
    made: dict[float | None, Any] = {None: quantization.default_static_qconfig}
    mapping = QConfigMapping()
    for name, alpha in alphas.items():
        if alpha not in made:
            made[alpha] = get_smooth_quant_qconfig_mapping(alpha).global_qconfig
        mapping.set_module_name(name, made[alpha])
    example = _example(model, example_inputs)
    args, kwargs = example.args or None, dict(example.kwargs) or None
    prepared = prepare(model, mapping, args, inplace=True, example_kwarg_inputs=kwargs)
    if mode.value == "prepare":
        return prepared
    _calibration(run_fn, run_args)(prepared)
    return convert(prepared, inplace=True)


def _auto_int8(model: nn.Module, alphas: dict, run: Callable, example_inputs: Any) -> nn.Module:
    calibration = collect(model, [_example(model, example_inputs)], [1], run)
    others = {name for name, module in model.named_modules() if is_linear(module)} - alphas.keys()
    quantizer = StaticQuantizer(calibration, [AUTO], read_smoothquant_args(None)[1], frozenset(others))
    return quantizer.quantized(Int8Candidate(AUTO, 1, tuple(sorted(others))))


def _weight_only(
    model: nn.Module, configs_mapping: dict, mode: Any, run_fn: Any = None, run_args: Any = None, **_: Any
) -> nn.Module:
    """Entry point of the weight-only algorithms for neural-compressor."""
    configs = _chosen(configs_mapping, WEIGHT_ONLY_NAME, "weight_dtype")
    if mode.value == "prepare" or not configs:
        return model
    algorithms, modes = ({getattr(config, key) for config in configs.values()} for key in ("algorithm", "lowp_mode"))
    if len(algorithms) > 1 or len(modes) > 1:
        raise ValueError("algorithm, lowp_mode: expected the same for all layers")
    (algorithm,), (lowp_mode,) = algorithms, modes
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm: expected one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
    schemes = tuple(
        (name, WeightScheme(WoqWeightDtype[c.weight_dtype.upper()], c.symmetric, c.group_size))
        for name, c in configs.items()
    )
    candidate = WeightOnlyCandidate(algorithm, WoqLowpMode[lowp_mode.upper()], schemes)
    found = FoundWeights()
    if algorithm != "rtn":
        if mode.value == "convert":
            raise ValueError(f"algorithm: {algorithm} needs data; use neural-compressor's quantize or autotune")
        found = find_weights(model, _batches(model, _calibration(run_fn, run_args)), candidate)
    return quantized_model(model, candidate, found, DEFAULT_ACT_QUANT_MODE, inplace=True)


def _chosen(configs_mapping: dict, algorithm: str, dtype: str) -> dict[str, Any]:
    """Configurations of the layers that `algorithm` is to quantize, by name."""
    ours = {name: config for (name, _), config in configs_mapping.items() if config.name == algorithm}
    return {name: config for name, config in ours.items() if getattr(config, dtype) != "fp32"}


def _calibration(run_fn: Any, run_args: Any) -> Callable[[nn.Module], Any]:
    if run_fn is None:
        raise ValueError("run_fn: expected a function that runs calibration data through the model, got None")
    arguments = () if run_args is None else run_args if isinstance(run_args, (tuple, list)) else (run_args,)
    return lambda model: run_fn(model, *arguments)


def _batches(model: nn.Module, run: Callable[[nn.Module], Any]) -> list[Example]:
    """The arguments of all calls of the model in ``run(model)``."""
    batches: list[Example] = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: batches.append(Example(args, kwargs)), with_kwargs=True
    )
    try:
        with torch.no_grad():
            run(model)
    finally:
        handle.remove()
    return batches


def _example(model: nn.Module, example_inputs: Any) -> Example:
    if example_inputs is None:
        raise ValueError("example_inputs: expected a tensor, a tuple or a dict, which show what layers share, got None")
    return Example.of_item(model, example_inputs, "example_inputs")
