"""Layers shaped like those of Baichuan: a joined projection in blocks, rotated, or with ALiBi (option "alibi")."""

import math

import torch
from torch import nn
from transformers.activations import ACT2FN

from .base import OwnModel, angles, causal, rotate_halves


class RMSNorm(nn.Module):
    def __init__(self, size, epsilon=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, hidden_states):
        mean = hidden_states.float().pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(mean + self.epsilon)
        return self.weight * hidden_states.to(self.weight.dtype)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.inner, bias=False)
        self.down_proj = nn.Linear(config.inner, config.hidden_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.inner, bias=False)
        self.act_fn = ACT2FN["silu"]

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class RotaryEmbedding(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, x, seq_len):
        turns = angles(torch.arange(seq_len), self.size).repeat(1, 2)[None, None]
        return turns.cos().to(x.dtype), turns.sin().to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.num_heads, self.head_dim = config.heads, config.head_size
        self.W_pack = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.rotary_emb = None if config.option == "alibi" else RotaryEmbedding(config.head_size)

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_ids=None,
        past_key_value=None,
        output_attentions=False,
        use_cache=False,
    ):
        batch, length, _ = hidden_states.shape
        joined = self.W_pack(hidden_states).unflatten(-1, (3, self.num_heads, self.head_dim))
        query, key, value = (x.transpose(1, 2) for x in joined.unbind(2))
        if self.rotary_emb is not None:
            total = length + (0 if past_key_value is None else past_key_value[0].shape[-2])
            cos, sin = (table[0, 0][position_ids][:, None] for table in self.rotary_emb(value, seq_len=total))
            query, key = rotate_halves(query, cos, sin), rotate_halves(key, cos, sin)
        if past_key_value is not None:
            key, value = (torch.cat(pair, dim=2) for pair in zip(past_key_value, (key, value), strict=True))
        past_key_value = (key, value) if use_cache else None
        scores = query @ key.transpose(2, 3) / math.sqrt(self.head_dim)
        if attention_mask is not None:
            if length == 1:
                attention_mask = attention_mask[..., -1:, :]
            scores = torch.max(scores + attention_mask, torch.tensor(torch.finfo(scores.dtype).min))
        weights = scores.softmax(dim=-1)
        attended = (weights @ value).transpose(1, 2).reshape(batch, length, -1)
        return self.o_proj(attended), weights if output_attentions else None, past_key_value


class Layer(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size)
        self.post_attention_layernorm = RMSNorm(config.hidden_size)

    def forward(self, hidden_states, attention_mask, position_ids, past_key_value=None, use_cache=False):
        attended, _, present = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_value=past_key_value,
            use_cache=use_cache,
        )
        hidden_states = hidden_states + attended
        hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return (hidden_states, present) if use_cache else (hidden_states,)


class Baichuan(OwnModel):
    time_axis = 2

    def __init__(self, config):
        super().__init__(config, Layer, RMSNorm)

    def run_layers(self, x, attention_mask, position_ids, past, use_cache):
        length, before = x.shape[1], 0 if past[0] is None else past[0][0].shape[2]
        rows = before + length if length == 1 and self.config.option == "alibi" else length
        seen = causal(rows, before + length)
        if attention_mask is not None and not attention_mask.all():
            seen = seen & (attention_mask != 0)[:, None, None]
        lowest = torch.finfo(x.dtype).min
        mask = torch.zeros(seen.shape, dtype=x.dtype).masked_fill(~seen, lowest)
        if self.config.option == "alibi":
            slopes = torch.exp2(-8 * torch.arange(1, self.config.heads + 1) / self.config.heads)
            bias = slopes[:, None, None] * torch.arange(before + length)
            mask = (mask + bias.to(x.dtype)).clamp(min=lowest)
        present = []
        for layer, past_key_value in zip(self.layers, past, strict=True):
            x, *more = layer(x, mask, position_ids, past_key_value, use_cache)
            present += more
        return x, present
