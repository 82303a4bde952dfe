"""Deci models: Llama, whose layers may differ in width, share keys otherwise, or lack a part.

In place of its attention a layer may have one linear layer, or nothing; in place of its MLP nothing. transformers has
no class for them. Source: NVIDIA's Puzzle (arXiv 2411.19146), and llama.cpp's graph of the models.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from ...checkpoints import GgufFile
from ...reading import shown
from .metadata import RMS_NORM, Entries, check_heads, of_layers, sizes_of
from .rope import rope_parameters

ATTENTION, MLP = "attention", "mlp"
"""Parts that a layer may skip, by their names in `per_layer_config`."""


class DeciConfig(LlamaConfig):
    """Llama's configuration; ``per_layer_config[layer]`` is that of a layer.

    A layer with `linear_attention` has one linear layer in place of its attention; `skip` lists parts that it lacks.
    """

    model_type = "deci"
    linear_attention: bool = False


class LinearAttention(torch.nn.Module):
    """One linear layer of every token by itself, with the interface of an attention."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.o_proj = torch.nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return self.o_proj(hidden_states), None


class DeciLayer(LlamaDecoderLayer):
    """A layer of a Deci model, as its own `config` says; `whole` is that of the model, `cached` its place in a cache.

    Layers without attention have no place: tokens are counted in the first, which must not be one that stays empty.
    """

    def __init__(self, config: DeciConfig, whole: DeciConfig, cached: int) -> None:
        super(LlamaDecoderLayer, self).__init__()
        self.hidden_size = config.hidden_size
        self.attends, self.has_mlp = ATTENTION not in config.skip, MLP not in config.skip
        if self.attends:
            self.self_attn = LinearAttention(config) if config.linear_attention else LlamaAttention(config, cached)
            self.self_attn.config = whole  # which learns how to compute attention after the model is made
            self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if self.has_mlp:
            self.mlp = LlamaMLP(config)
            self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if self.attends:
            hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]
        if self.has_mlp:
            hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states


class DeciModel(LlamaModel):
    """A Deci model without its output layer."""

    def __init__(self, config: DeciConfig) -> None:
        super(LlamaModel, self).__init__(config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = torch.nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = torch.nn.ModuleList()
        cached = 0
        for own in config.per_layer_config:
            self.layers.append(DeciLayer(own, config, cached))
            cached += ATTENTION not in own.skip and not own.linear_attention
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class DeciForCausalLM(LlamaForCausalLM):
    """A Deci model that predicts tokens."""

    config_class = DeciConfig

    def __init__(self, config: DeciConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)
        self.model = DeciModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


def deci_entries(file: GgufFile) -> Entries:
    """Entries of the configuration of a Llama if all layers are alike, else of a Deci; ValueError for absurd ones."""
    entries = sizes_of(file, RMS_NORM, without=("num_attention_heads", "intermediate_size"))
    heads, groups = (of_layers(file, f"attention.head_count{end}") for end in ("", "_kv"))
    widths = of_layers(file, "feed_forward_length")
    count = max(heads)
    if not count or {*heads} - {0, count} or not any(groups) or not any(widths):
        raise ValueError(f"{file.path}: deci.attention.head_count: expected one number, or 0, got {shown(heads)}")
    size = file.head_size()
    if not 0 < size < 1 << 20:
        raise ValueError(f"{file.path}: deci.attention.key_length: expected a size, got {size}")
    for own in {group for head, group in zip(heads, groups, strict=True) if head and group}:
        check_heads(file, count, own, size)
    entries |= {
        "num_attention_heads": count,
        "num_key_value_heads": max(groups),
        "intermediate_size": max(widths),
        "head_dim": size,
        "rope_parameters": rope_parameters(file, size),
    }
    layers = {
        layer: own
        for layer, numbers in enumerate(zip(heads, groups, widths, strict=True))
        if (own := _differs(*numbers, entries))
    }
    if not layers:
        return entries | {"model_type": "llama"}
    return entries | {"model_type": DeciConfig.model_type, "class": "DeciForCausalLM", "per_layer_config": layers}


def _differs(heads: int, groups: int, width: int, entries: Entries) -> Entries:
    """What a layer with these numbers has otherwise than the `entries` of the model."""
    skip = [part for part, size in ((ATTENTION, heads), (MLP, width)) if not size]
    own: Entries = {"skip": skip} if skip else {}
    if heads and not groups:
        own["linear_attention"] = True
    elif heads and groups != entries["num_key_value_heads"]:
        own["num_key_value_heads"] = groups
    if width and width != entries["intermediate_size"]:
        own["intermediate_size"] = width
    return own
