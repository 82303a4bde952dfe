"""Layers shaped like those of Yuan 2: convolutions filter what queries and keys, but not values, are made of."""

import math

import torch
from torch import nn

from .baichuan import RotaryEmbedding
from .base import OwnModel, causal, rotate_halves


class RMSNorm(nn.Module):
    def __init__(self, size, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        wide = hidden_states.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(hidden_states.dtype)


class LocalizedFiltering(nn.Module):
    """Two convolutions over the last tokens, and a norm of the sum with the input."""

    def __init__(self, size):
        super().__init__()
        self.conv1 = nn.Conv2d(size, size // 2, (2, 1), padding=(1, 0))
        self.conv2 = nn.Conv2d(size // 2, size, (2, 1), padding=(1, 0))
        self.output_layernorm = RMSNorm(size)

    def forward(self, x, before):
        """Filter `x` ``[B, L, K]``; a single token comes with the two `before` it, else all are given."""
        inputs = x if before is None else torch.cat((before, x), dim=1)
        length = inputs.shape[1]
        inputs = self.conv1(inputs.transpose(1, 2).unsqueeze(-1))[:, :, :length]
        filtered = self.conv2(inputs)[:, :, :length].squeeze(-1).transpose(1, 2)
        return self.output_layernorm(filtered[:, -x.shape[1] :] + x)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_heads, self.head_dim = config.heads, config.head_size
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.rotary_emb = RotaryEmbedding(config.head_size)
        self.lf_gate = LocalizedFiltering(config.hidden_size)
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states, attention_mask, position_ids, past_key_value=None, use_cache=False):
        batch, length, _ = hidden_states.shape
        before = None if past_key_value is None else past_key_value[2]
        memory = torch.cat((hidden_states[:, :1] * 0 if before is None else before, hidden_states), dim=1)[:, -2:]
        value = self.v_proj(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        filtered = self.lf_gate(hidden_states, before)
        joined = torch.cat((self.q_proj(filtered), self.k_proj(filtered)), dim=-1)
        query, key = joined.unflatten(-1, (self.num_heads, -1)).transpose(1, 2).chunk(2, dim=-1)
        total = length + (0 if past_key_value is None else past_key_value[0].shape[-2])
        cos, sin = (table[0, 0][position_ids][:, None] for table in self.rotary_emb(value, seq_len=total))
        query, key = rotate_halves(query, cos, sin), rotate_halves(key, cos, sin)
        if past_key_value is not None:
            key, value = (torch.cat(pair, dim=2) for pair in zip(past_key_value[:2], (key, value), strict=True))
        past_key_value = (key, value, memory) if use_cache else None
        scores = query @ key.transpose(2, 3) / math.sqrt(self.head_dim) + attention_mask
        attended = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype) @ value
        return self.o_proj(attended.transpose(1, 2).reshape(batch, length, -1)), past_key_value


class MLP(nn.Module):
    """The activation is on the layer that is called up."""

    def __init__(self, config):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.inner, bias=False)
        self.gate_proj = nn.Linear(config.hidden_size, config.inner, bias=False)
        self.down_proj = nn.Linear(config.inner, config.hidden_size, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))


class Layer(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size)
        self.post_attention_layernorm = RMSNorm(config.hidden_size)

    def forward(self, hidden_states, attention_mask, position_ids, past_key_value, use_cache):
        x = self.input_layernorm(hidden_states)
        attended, present = self.self_attn(x, attention_mask, position_ids, past_key_value, use_cache)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)), present


class Yuan(OwnModel):
    time_axis = 2

    def __init__(self, config):
        super().__init__(config, Layer, RMSNorm)

    def run_layers(self, x, attention_mask, position_ids, past, use_cache):
        length, before = x.shape[1], 0 if past[0] is None else past[0][0].shape[2]
        seen = causal(length, before + length)[None, None].expand(len(x), -1, -1, -1)
        if attention_mask is not None:
            seen = seen & (attention_mask != 0)[:, None, None]
        mask = torch.zeros(seen.shape, dtype=x.dtype).masked_fill(~seen, torch.finfo(x.dtype).min)
        present = []
        for layer, past_key_value in zip(self.layers, past, strict=True):
            x, past_key_value = layer(x, mask, position_ids, past_key_value, use_cache)
            present.append(past_key_value)
        return x, present
