"""`use_native_stack`: fused decoder layers, native norms, attention and KV caches around the linear layers."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..nn.fused_forward import fused_forward, restore_forwards
from .attention import NAME, is_attention, is_native, use_native_attention
from .decoder.families import FAMILIES
from .decoder.layer import FusedLayer, fuse_decoder
from .decoder.linears import fuse_linears
from .decoder.model import FusedModel, fuse_model
from .decoder.norms import fuse_norms, norm_of
from .decoder.own_attention import fuse_attention, is_own_attention
from .decoder.own_mlp import OwnMlp, fuse_mlps, mlp_of, own_modules
from .generation import CacheHook, use_native_cache

logger = logging.getLogger("ipex_quant")


@dataclass(frozen=True)
class Part:
    """Names of a model's modules of one sort (such as norms): those that compute natively, and those that do not."""

    sort: str
    native: tuple[str, ...]
    stock: tuple[str, ...]

    def __str__(self) -> str:
        stock = f"; stock: {', '.join(self.stock)}" if self.stock else ""
        return f"{self.sort}: {len(self.native)} of {len(self.native) + len(self.stock)} native{stock}"


def parts_of(model: nn.Module) -> list[Part]:
    """The decoder layers, norms, attention modules and other MLPs of `model`, and which of them compute natively."""
    alone = {id(module) for module in own_modules(model).values()}
    tests = {
        "decoder layers": (lambda module: type(module).__name__ in FAMILIES, fused_forward),
        "norms": (lambda module: not isinstance(module, nn.LayerNorm) and norm_of(module), fused_forward),
        "attention modules": (
            lambda module: is_attention(module) or is_own_attention(module),
            lambda module: id(module) not in alone or fused_forward(module) or _uses_interface(module),
        ),
        "MLPs": (lambda module: id(module) in alone and (_is_own_mlp(module) or mlp_of(module)), _is_own_mlp),
    }
    parts = []
    for sort, (belongs, native) in tests.items():
        found = {name: bool(native(module)) for name, module in model.named_modules() if belongs(module)}
        if found:
            names = (tuple(name for name, value in found.items() if value is wanted) for wanted in (True, False))
            parts.append(Part(sort, *names))
    return parts


def use_native_stack(model: nn.Module, kv_cache_dtype: torch.dtype | None = None, attention: bool = True) -> None:
    """Let decoder layers, norms, MLPs, linears, attention and caches of `model` compute natively where they can.

    `kv_cache_dtype` is that of `use_native_cache`. Without `attention` the model keeps its own attention and its stock
    decoder layers, since fused ones always use the native attention. Modules that stay stock are logged, and `explain`
    lists them. Call it again after modules were replaced. Raises ValueError for an unsupported `kv_cache_dtype`.
    """
    if attention:
        fuse_decoder(model)
    fuse_norms(model)
    fuse_mlps(model)
    fuse_linears(model)
    if attention:
        fuse_attention(model)
        fuse_model(model)
    if isinstance(model, PreTrainedModel):
        if attention:
            use_native_attention(model)
            # a partial, which can be copied and pickled with the model
            model.set_attn_implementation = functools.partial(_set_attn_implementation, model)
        use_native_cache(model, kv_cache_dtype)
    if logger.isEnabledFor(logging.INFO):  # trials of every module take a while
        for part in parts_of(model):
            logger.info("%s", part)


def _set_attn_implementation(model: PreTrainedModel, implementation: Any, *args: Any, **kwargs: Any) -> None:
    """transformers' `set_attn_implementation`, which also fuses or restores layers: fused ones attend natively only."""
    type(model).set_attn_implementation(model, implementation, *args, **kwargs)
    if implementation == NAME:
        fuse_decoder(model)
        fuse_model(model)
    else:
        restore_forwards(model, FusedLayer, FusedModel)


def native_stack(model: nn.Module) -> tuple[bool, torch.dtype | None]:
    """Whether `use_native_stack` was called for `model`, a transformers model, and its `kv_cache_dtype`."""
    hook = next((hook for hook in model._forward_pre_hooks.values() if isinstance(hook, CacheHook)), None)
    return (False, None) if hook is None else (True, hook.dtype)


def attends_natively(model: nn.Module) -> bool:
    """Whether any decoder layer or attention module of `model` uses the native attention now."""
    return any(part.native for part in parts_of(model) if part.sort in ("decoder layers", "attention modules"))


def _is_own_mlp(module: nn.Module) -> bool:
    return isinstance(fused_forward(module), OwnMlp)


def _uses_interface(module: nn.Module) -> bool:
    return is_attention(module) and is_native(module)
