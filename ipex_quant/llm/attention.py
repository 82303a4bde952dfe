"""Native attention for any transformers model whose attention goes through `AttentionInterface`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask
from transformers.utils.import_utils import is_tracing

from ..nn.deferred import DeferredTensor, values_of
from .cache.naming import cache_name
from .cache.paged import PagedTensor
from .cache.storage import Storage, attend

NAME = "ipex_quant"


def register() -> None:
    """Register the native attention with transformers as the attention implementation ``"ipex_quant"``."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


def use_native_attention(model: PreTrainedModel) -> list[str]:
    """Let `model` use the native attention where it can; return the names of the attention modules that cannot.

    Modules that do not call transformers' attention interface, and those with attention sinks, keep their own
    attention. Raises TypeError if `model` is no transformers model.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a transformers model, got {type(model).__name__}")
    register()
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    before = [(part, part.config._attn_implementation) for part in parts if not _covers(part)]
    if model._can_set_attn_implementation():
        type(model).set_attn_implementation(model, NAME)  # of the class: the model's own may change fused layers
    for part, implementation in before:
        type(part).set_attn_implementation(part, implementation)
    return [name for name, module in model.named_modules() if is_attention(module) and not is_native(module)]


def _covers(model: PreTrainedModel) -> bool:
    if model._supports_sdpa:
        return True
    # A model supports flash attention but not sdpa because of a soft cap, which the native attention has, because of
    # sinks, which it has not, or because it is a decoder whose attention modules lack `is_causal`.
    if not model._supports_flash_attn or any(hasattr(module, "sinks") for module in model.modules()):
        return False
    is_decoder = cache_name(model.forward) is not None
    return not is_decoder or any(getattr(module, "is_causal", False) for module in model.modules())


def is_attention(module: nn.Module) -> bool:
    """Whether `module` is named as transformers names the modules that read a key/value cache."""
    return "Attention" in type(module).__name__ and (hasattr(module, "layer_idx") or hasattr(module, "layer_id"))


def is_native(module: nn.Module) -> bool:
    """Whether the configuration of an attention `module` selects the native attention."""
    config = getattr(module, "config", None)
    return getattr(config, "_attn_implementation", None) == NAME


class WindowMask(DeferredTensor):
    """The causal mask of a sliding window without padding: bool ``[B, 1, Lq, T]``, True where a query sees a key."""

    @staticmethod
    def __new__(cls, shape: Sequence[int], window: int, device: torch.device) -> WindowMask:
        return DeferredTensor.__new__(cls, shape, torch.bool, device)

    def __init__(self, shape: Sequence[int], window: int, device: torch.device):
        self.window = window

    def _compute(self) -> torch.Tensor:
        queries, keys = self.shape[2:]
        positions = torch.arange(keys - queries, keys, device=self.device).unsqueeze(1)
        distance = positions - torch.arange(keys, device=self.device)
        return ((distance >= 0) & (distance < self.window)).expand(self.shape)


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    config: Any = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask for `attention_forward`: bool ``[B, 1, Lq, T]`` as for sdpa, or None for a plain causal mask.

    Unlike with sdpa, None also means causal if there are more keys than queries: the queries are then the last
    positions. The mask of a sliding window without padding is a `WindowMask`, whose values are computed only if read.
    """
    # Modules that are not causal take None as "no mask", which is right for a whole prompt only.
    later_chunk = getattr(config, "use_bidirectional_attention", False) and 1 < q_length < kv_length
    allow_is_causal_skip = allow_is_causal_skip and not later_chunk
    if allow_is_causal_skip and not isinstance(q_offset, torch.Tensor) and q_offset + q_length == kv_offset + kv_length:
        padding = None if attention_mask is None else attention_mask[:, kv_offset : kv_offset + kv_length]
        if padding is None or not (is_tracing(padding) or padding.shape[1] < kv_length or not padding.all()):
            if local_size is None or (kv_length <= local_size and _slides(config, local_size)):
                return None
            if _slides(config, local_size) and not torch.compiler.is_compiling():
                device = torch.device(kwargs.get("device", "cpu"))
                return WindowMask((batch_size, 1, q_length, kv_length), local_size, device)
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        **kwargs,
    )


def _slides(config: Any, local_size: int) -> bool:
    """Whether `local_size` is a sliding window, not the chunk of a chunked attention."""
    return getattr(config, "sliding_window", None) == local_size != getattr(config, "attention_chunk_size", None)


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of `query` ``[B, H, Lq, D]`` over `key` and `value` ``[B, Hkv, T, D]``, as transformers calls it.

    Returns (``[B, Lq, H, Dv]``, None). Keys and values of a `NativeLayer` are read from the cache without a copy or a
    conversion; those of a `PagedLayer` from its blocks, whatever the mask. With gradients or `dropout` it runs in plain
    torch; under autocast it computes in autocast's dtype. Raises ValueError for attention sinks, which are not
    supported.
    """
    if kwargs.get("s_aux") is not None:
        raise ValueError("attention sinks are not supported: call model.set_attn_implementation('eager')")
    if kwargs.get("output_attentions"):
        warnings.warn(
            "the native attention has no weights to return: call model.set_attn_implementation('eager')", stacklevel=2
        )
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
    options: dict[str, Any] = {"scale": query.shape[-1] ** -0.5 if scaling is None else scaling}
    if softcap is not None:
        options["softcap"] = softcap
    if isinstance(key, PagedTensor):
        return key.attention(query, **options), None
    if attention_mask is None:
        options["causal"] = getattr(module, "is_causal", True) if is_causal is None else is_causal
    elif isinstance(attention_mask, WindowMask):
        options["causal"], options["window"] = True, attention_mask.window
    else:
        options["mask"] = attention_mask
    if position_bias is not None:
        options["mask"] = with_bias(options.pop("mask", None), position_bias)
    keys, values = Storage.of(key), Storage.of(value)
    if (keys.rows is None, keys.scales is None) != (values.rows is None, values.scales is None):
        # The model replaced one of them, so they are no longer stored alike.
        keys, values = (Storage.of(values_of(x)) for x in (key, value))
    if len(query) != keys.batch:
        query = query.expand(keys.batch, -1, -1, -1)
    if dropout:
        options["dropout"] = dropout
    return attend(query, keys, values, **options), None


def with_bias(mask: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor | None:
    """`mask`, bool or added to the scores, joined with `bias` to one tensor that is added to the scores."""
    if mask is None or bias is None:
        return mask if bias is None else bias
    return bias.masked_fill(~mask, torch.finfo(bias.dtype).min) if mask.dtype == torch.bool else bias + mask
