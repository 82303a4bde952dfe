"""Layers shaped like those of ChatGLM 1 (option "first") and of ChatGLM 2 and 3: the sequence axis comes first."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .base import OwnModel, angles, causal, rotate_halves


class RMSNorm(nn.Module):
    def __init__(self, size, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden_states):
        mean = hidden_states.float().pow(2).mean(-1, keepdim=True)
        return (self.weight * (hidden_states * torch.rsqrt(mean + self.eps))).to(hidden_states.dtype)


def rotate_pairs(x, table):
    """Rotate neighbours among the first features of `x` ``[L, B, H, D]`` by `table` ``[L, B, R / 2, 2]``."""
    size = table.shape[-2] * 2
    pairs = x[..., :size].unflatten(-1, (-1, 2))
    cos, sin = table[:, :, None].unbind(-1)
    first, second = pairs.unbind(-1)
    turned = torch.stack((first * cos - second * sin, second * cos + first * sin), -1).flatten(-2)
    return torch.cat((turned, x[..., size:]), dim=-1)


class CoreAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention_dropout = nn.Dropout(0.1)

    def forward(self, query, key, value, attention_mask):
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if attention_mask is None and query.shape[2] == key.shape[2]:
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            mask = None if attention_mask is None else ~attention_mask
            out = F.scaled_dot_product_attention(query, key, value, mask)
        return out.permute(2, 0, 1, 3).flatten(2)


class SelfAttention(nn.Module):
    """Multi-query: groups of query heads share a head of keys and values. Half of the features rotate."""

    def __init__(self, config, groups=2):
        super().__init__()
        self.head_size, self.heads, self.groups = config.head_size, config.heads, groups
        self.query_key_value = nn.Linear(config.hidden_size, (config.heads + 2 * groups) * config.head_size)
        self.core_attention = CoreAttention()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states, attention_mask, rotary_pos_emb, kv_cache=None, use_cache=True):
        sizes = [count * self.head_size for count in (self.heads, self.groups, self.groups)]
        query, key, value = (
            x.unflatten(-1, (-1, self.head_size)) for x in self.query_key_value(hidden_states).split(sizes, dim=-1)
        )
        query, key = rotate_pairs(query, rotary_pos_emb), rotate_pairs(key, rotary_pos_emb)
        if kv_cache is not None:
            key, value = (torch.cat(pair, dim=0) for pair in zip(kv_cache, (key, value), strict=True))
        kv_cache = (key, value) if use_cache else None
        copies = self.heads // self.groups
        key, value = (x.repeat_interleave(copies, dim=2) for x in (key, value))
        return self.dense(self.core_attention(query, key, value, attention_mask)), kv_cache


class MLP(nn.Module):
    """Gate and up are halves of one layer; the activation is a function of both."""

    def __init__(self, config):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.inner, bias=False)
        self.activation_func = swiglu
        self.dense_4h_to_h = nn.Linear(config.inner, config.hidden_size, bias=False)

    def forward(self, hidden_states):
        return self.dense_4h_to_h(self.activation_func(self.dense_h_to_4h(hidden_states)))


def swiglu(x):
    first, second = torch.chunk(x, 2, dim=-1)
    return F.silu(first) * second


class Block(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size)
        self.self_attention = SelfAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size)
        self.mlp = MLP(config)

    def forward(self, hidden_states, attention_mask, rotary_pos_emb, kv_cache=None, use_cache=True):
        attended, kv_cache = self.self_attention(
            self.input_layernorm(hidden_states), attention_mask, rotary_pos_emb, kv_cache=kv_cache, use_cache=use_cache
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)), kv_cache


class FirstAttention(nn.Module):
    """Query, key and value lie side by side in every head, and two kinds of positions rotate a half of each."""

    def __init__(self, config, index):
        super().__init__()
        self.head_size, self.heads, self.layer_id = config.head_size, config.heads, index
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states, position_ids, attention_mask, layer_id, layer_past=None, use_cache=False):
        joined = self.query_key_value(hidden_states).unflatten(-1, (self.heads, 3 * self.head_size))
        query, key, value = joined.chunk(3, dim=-1)
        query, key = (self.rotated(x, position_ids) for x in (query, key))
        if layer_past is not None:
            key, value = (torch.cat(pair, dim=0) for pair in zip(layer_past, (key, value), strict=True))
        present = (key, value) if use_cache else None
        factor = float(layer_id + 1)
        scores = torch.einsum("qbhd,kbhd->bhqk", query / (math.sqrt(self.head_size) * factor), key)
        if not (attention_mask == 0).all():
            scores = scores.masked_fill(attention_mask, -10000.0)
        probabilities = F.softmax(scores.float() * factor, dim=-1).type(hidden_states.dtype)
        attended = torch.einsum("bhqk,kbhd->qbhd", probabilities, value).flatten(2)
        return self.dense(attended), present

    def rotated(self, x, position_ids):
        halves = []
        for half, positions in zip(x.chunk(2, dim=-1), position_ids, strict=True):
            turns = angles(positions.t(), half.shape[-1])[:, :, None].repeat(1, 1, 1, 2)
            halves.append(rotate_halves(half, turns.cos().to(x.dtype), turns.sin().to(x.dtype)))
        return torch.cat(halves, dim=-1)


class FirstMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.inner)
        self.dense_4h_to_h = nn.Linear(config.inner, config.hidden_size)

    def forward(self, hidden_states):
        x = self.dense_h_to_4h(hidden_states)
        x = 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * x * (1.0 + 0.044715 * x * x)))
        return self.dense_4h_to_h(x)


class FirstBlock(nn.Module):
    """Adds what the norm returns, times a factor of the depth."""

    def __init__(self, config, index):
        super().__init__()
        self.layer_id, self.alpha = index, (2 * config.layers) ** 0.5
        self.input_layernorm = nn.LayerNorm(config.hidden_size)
        self.attention = FirstAttention(config, index)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size)
        self.mlp = FirstMLP(config)

    def forward(self, hidden_states, attention_mask, position_ids, kv_cache=None, use_cache=True):
        x = self.input_layernorm(hidden_states)
        attended, present = self.attention(x, position_ids, attention_mask, self.layer_id, kv_cache, use_cache)
        x = self.post_attention_layernorm(x * self.alpha + attended)
        return x * self.alpha + self.mlp(x), present


class Glm(OwnModel):
    time_axis = 0

    def __init__(self, config):
        first = config.option == "first"
        super().__init__(config, FirstBlock if first else Block, nn.LayerNorm if first else RMSNorm)

    def run_layers(self, x, attention_mask, position_ids, past, use_cache):
        length, before = x.shape[1], 0 if past[0] is None else past[0][0].shape[0]
        hidden = ~causal(length, before + length)[None, None].expand(len(x), -1, -1, -1)
        if attention_mask is not None:
            hidden = hidden | (attention_mask == 0)[:, None, None]
        padded = attention_mask is not None and not attention_mask.all()
        if self.config.option == "first":
            positions = torch.stack((position_ids, position_ids // 2))
        else:
            turns = angles(position_ids.t(), self.config.head_size // 2)
            positions = torch.stack((turns.cos(), turns.sin()), -1).to(x.dtype)
            hidden = hidden if padded or (before and length > 1) else None
        x, present = x.transpose(0, 1).contiguous(), []
        for layer, kv_cache in zip(self.layers, past, strict=True):
            x, kv_cache = layer(x, hidden, positions, kv_cache=kv_cache, use_cache=use_cache)
            present.append(kv_cache)
        return x.transpose(0, 1).contiguous(), present
