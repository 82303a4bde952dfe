"""Quantization of large language models for CPUs, with the API of Intel Extension for PyTorch.

Importing this package is cheap: submodules and native kernels load when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import autotune, cpu, llm, nn, ops, optim, quantization
    from .alias import install_as_ipex
    from .bert import fast_bert
    from .frontend.optimization import optimize
    from .llm.explain import explain
    from .settings import (
        FP32MathMode,
        OnDevice,
        disable_auto_channels_last,
        enable_auto_channels_last,
        enable_onednn_fusion,
        get_fp32_math_mode,
        set_fp32_math_mode,
        set_logging_level,
    )
    from .settings import (
        compile as compile,  # not in __all__: `import *` would hide Python's
    )
    from .verbosity import VERBOSE_OFF, VERBOSE_ON, VERBOSE_ON_CREATION, verbose

_SUBMODULES = ("autotune", "cpu", "llm", "nn", "ops", "optim", "quantization")

_HOMES = {
    "FP32MathMode": "settings",
    "OnDevice": "settings",
    "_set_optimized_model_for_generation": "llm.trace_graph",
    "VERBOSE_OFF": "verbosity",
    "VERBOSE_ON": "verbosity",
    "VERBOSE_ON_CREATION": "verbosity",
    "compile": "settings",
    "disable_auto_channels_last": "settings",
    "enable_auto_channels_last": "settings",
    "enable_onednn_fusion": "settings",
    "explain": "llm.explain",
    "fast_bert": "bert",
    "get_fp32_math_mode": "settings",
    "install_as_ipex": "alias",
    "optimize": "frontend.optimization",
    "set_fp32_math_mode": "settings",
    "set_logging_level": "settings",
    "verbose": "verbosity",
}
"""The module of each name that loads when it is first used."""

__all__ = [
    "VERBOSE_OFF",
    "VERBOSE_ON",
    "VERBOSE_ON_CREATION",
    "FP32MathMode",
    "OnDevice",
    "autotune",
    "cpu",
    "disable_auto_channels_last",
    "enable_auto_channels_last",
    "enable_onednn_fusion",
    "explain",
    "fast_bert",
    "get_fp32_math_mode",
    "install_as_ipex",
    "llm",
    "nn",
    "ops",
    "optim",
    "optimize",
    "optimize_transformers",
    "quantization",
    "set_fp32_math_mode",
    "set_logging_level",
    "show_config",
    "verbose",
]

__version__: str
"""The installed version."""


def show_config() -> None:
    """Print the versions of this package and torch, the instruction set its kernels use, and torch's threads."""
    import torch

    from . import ops

    print(f"ipex_quant  {_version()}")
    print(f"torch       {torch.__version__}")
    print(f"ISA         {ops.isa_name()}")
    print(f"threads     {torch.get_num_threads()}")


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(__name__)
    except PackageNotFoundError:  # a source tree on the path
        return "unknown (not installed)"


def optimize_transformers(*args: Any, **kwargs: Any) -> Any:
    """Call ``llm.optimize``, under its old name; warns of the deprecation."""
    import warnings

    from . import llm

    warnings.warn("optimize_transformers is deprecated: call ipex_quant.llm.optimize", DeprecationWarning, stacklevel=2)
    return llm.optimize(*args, **kwargs)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_HOMES})
