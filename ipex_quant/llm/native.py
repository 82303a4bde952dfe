"""The floating-point stack around linear layers: fused decoder layers, norms, attention and caches, all at once."""

from __future__ import annotations

import logging

import torch
from torch import nn
from transformers import PreTrainedModel

from .attention import use_native_attention
from .decoder import fuse_decoder
from .generation import CacheHook, use_native_cache
from .norms import fuse_norms

logger = logging.getLogger("ipex_quant")


def use_native_stack(model: nn.Module, kv_cache_dtype: torch.dtype | None = None) -> None:
    """Let `model` compute everything natively that its structure and its layers' families allow, in place.

    `kv_cache_dtype` is that of `use_native_cache`. What stays stock is logged, and told by `explain`. Call it again
    after modules were replaced. Raises ValueError for another `kv_cache_dtype`.
    """
    layers, norms = fuse_decoder(model), fuse_norms(model)
    logger.info("%d decoder layers and %d norms are fused", len(layers), len(norms))
    if isinstance(model, PreTrainedModel):
        use_native_attention(model)
        stock = use_native_cache(model, kv_cache_dtype)
        if stock:
            logger.info("%d attention modules keep their own code: %s", len(stock), ", ".join(stock))


def native_stack(model: nn.Module) -> tuple[bool, torch.dtype | None]:
    """Whether `use_native_stack` was called for a transformers model, and with which `kv_cache_dtype`."""
    hook = next((hook for hook in model._forward_pre_hooks.values() if isinstance(hook, CacheHook)), None)
    return (False, None) if hook is None else (True, hook.dtype)
