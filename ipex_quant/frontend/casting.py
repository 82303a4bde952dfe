"""Casting the parameters of a model to bfloat16 or float16: which, and for inference."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn

logger = logging.getLogger("ipex_quant")

_FLOAT32_NAMES = "_ipex_quant_float32_names"

CAST_FOR_TRAINING: frozenset[type[nn.Module]] = frozenset(
    (
        nn.Linear,
        nn.Conv1d,
        nn.Conv2d,
        nn.Conv3d,
        nn.ConvTranspose1d,
        nn.ConvTranspose2d,
        nn.ConvTranspose3d,
        nn.Embedding,
        nn.EmbeddingBag,
    )
)
"""Modules whose parameters are cast, not their subclasses, which may compute otherwise. Norms take either dtype."""

CAST_FOR_INFERENCE = CAST_FOR_TRAINING | frozenset(
    (
        nn.LSTM,
        nn.MultiheadAttention,
        nn.modules.linear.NonDynamicallyQuantizableLinear,  # the last layer of a MultiheadAttention
    )
)
"""Modules whose parameters are cast for inference, not their subclasses."""


def cast_for_inference(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the float32 parameters of the modules in `CAST_FOR_INFERENCE` to `dtype`, in place; tied ones stay tied.

    A module that shares a parameter with one of another class keeps all of its own. Parameters of another dtype stay,
    and a logged warning names it. The `state_dict` of `model` still has float32 values, as IPEX's has.
    """
    refused: dict[torch.dtype, None] = {}
    cast = set()
    for _, _, param in list(castable_parameters(model, CAST_FOR_INFERENCE)):
        if param.dtype == torch.float32:
            param.data = param.data.to(dtype)
            cast.add(param)
        elif param.dtype != dtype:
            refused[param.dtype] = None
    for other in refused:
        logger.warning("[NotSupported]Can't convert model's parameters dtype from %s to %s", other, dtype)
    _save_in_float32(model, {name for name, p in model.named_parameters(remove_duplicate=False) if p in cast})


def is_cast(module: nn.Module) -> bool:
    """Whether `cast_for_inference` cast parameters of `module`, or of parts of it."""
    return bool(getattr(module, _FLOAT32_NAMES, None))


def _save_in_float32(model: nn.Module, names: set[str]) -> None:
    """Let the state dict of `model` have float32 values of the parameters `names`; it is copied and pickled with it."""
    if not hasattr(model, _FLOAT32_NAMES):
        setattr(model, _FLOAT32_NAMES, frozenset())
        model.register_state_dict_post_hook(_widen_values)
        model.register_load_state_dict_pre_hook(_narrow_values)
    setattr(model, _FLOAT32_NAMES, getattr(model, _FLOAT32_NAMES) | names)


def _widen_values(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    widened: dict[Any, torch.Tensor] = {}  # tied parameters stay one tensor
    for name in getattr(module, _FLOAT32_NAMES):
        value = state_dict.get(prefix + name)
        if value is not None:
            key = value.data_ptr(), value.shape, value.stride()
            state_dict[prefix + name] = widened.setdefault(key, value.detach().float())


def _narrow_values(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name in getattr(module, _FLOAT32_NAMES) & parameters.keys():
        value = state_dict.get(prefix + name)
        if isinstance(value, torch.Tensor) and value.dtype == torch.float32:  # which may be assigned, not copied
            state_dict[prefix + name] = value.to(parameters[name].dtype)


def castable_parameters(
    model: nn.Module, kinds: Collection[type[nn.Module]]
) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Module, name and parameter of all parameters that only modules of these `kinds` use, as often as they do.

    A module that shares a parameter with one of another kind keeps all of its own: its parameters have one dtype. This
    does not count for a module that shares nothing but the bias of a part of it, as heads of transformers models do.
    """
    owned = [(m, name, p) for m in model.modules() for name, p in m.named_parameters(recurse=False)]
    kept = {m for m, _, p in owned if type(m) not in kinds and not _is_bias_of_part(m, p)}
    while True:
        kept_parameters = {p for m, _, p in owned if m in kept}
        more = {m for m, _, p in owned if p in kept_parameters} - kept
        if not more:
            break
        kept |= more
    yield from (entry for entry in owned if entry[0] not in kept)


def _is_bias_of_part(module: nn.Module, param: nn.Parameter) -> bool:
    return any(getattr(child, "bias", None) is param for child in module.children())
