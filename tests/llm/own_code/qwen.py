"""Layers shaped like those of QWen 1: queries beyond the trained length grow with the logarithm of their position."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .base import OwnModel, angles, causal, rotate_halves


class RMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def _norm(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x):
        return self._norm(x.float()).type_as(x) * self.weight


class Attention(nn.Module):
    def __init__(self, config, trained_length=8):
        super().__init__()
        self.register_buffer("masked_bias", torch.tensor(-1e4), persistent=False)
        self.num_heads, self.head_dim, self.split_size = config.heads, config.head_size, config.hidden_size
        self.c_attn = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.c_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.register_buffer("logn_tensor", torch.empty(1, config.longest, 1, 1), persistent=False)
        self.trained_length = trained_length
        self.init_buffers()

    def init_buffers(self):
        self.masked_bias.fill_(-1e4)
        lengths = torch.arange(1, self.logn_tensor.shape[1] + 1).clamp(min=self.trained_length)
        self.logn_tensor.copy_((lengths.log() / math.log(self.trained_length))[None, :, None, None])

    def forward(self, hidden_states, rotary_pos_emb_list=None, layer_past=None, attention_mask=None, use_cache=False):
        query, key, value = (
            x.unflatten(-1, (self.num_heads, self.head_dim))
            for x in self.c_attn(hidden_states).split(self.split_size, dim=2)
        )
        cos, sin = (table[:, -query.shape[1] :] for table in rotary_pos_emb_list[0])
        query, key = (rotate_halves(x.float(), cos, sin).type_as(x) for x in (query, key))
        if layer_past is not None:
            key, value = (torch.cat(pair, dim=1) for pair in zip(layer_past, (key, value), strict=True))
        present = (key, value) if use_cache else None
        total = key.shape[1]
        query = query * self.logn_tensor[:, total - query.shape[1] : total].type_as(query)
        seen = causal(query.shape[1], total)
        mask = torch.zeros(seen.shape, dtype=query.dtype).masked_fill(~seen, torch.finfo(query.dtype).min)
        if attention_mask is not None:
            mask = (mask + attention_mask).clamp(min=torch.finfo(query.dtype).min)
        query, key, value = (x.permute(0, 2, 1, 3) for x in (query, key, value))
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)
        return self.c_proj(attended.flatten(2)), present


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.inner, bias=False)
        self.w2 = nn.Linear(config.hidden_size, config.inner, bias=False)
        self.c_proj = nn.Linear(config.inner, config.hidden_size, bias=False)

    def forward(self, hidden_states):
        return self.c_proj(self.w1(hidden_states) * F.silu(self.w2(hidden_states)))


class Block(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        self.ln_1 = RMSNorm(config.hidden_size)
        self.attn = Attention(config)
        self.ln_2 = RMSNorm(config.hidden_size)
        self.mlp = MLP(config)

    def forward(self, hidden_states, rotary_pos_emb_list, layer_past=None, attention_mask=None, use_cache=False):
        x = self.ln_1(hidden_states)
        attended, present = self.attn(x, rotary_pos_emb_list, layer_past, attention_mask, use_cache)
        hidden_states = attended + hidden_states
        return hidden_states + self.mlp(self.ln_2(hidden_states)), present


class QWen(OwnModel):
    time_axis = 1

    def __init__(self, config):
        super().__init__(config, Block, RMSNorm)

    def run_layers(self, x, attention_mask, position_ids, past, use_cache):
        total = x.shape[1] + (0 if past[0] is None else past[0][0].shape[1])
        if attention_mask is not None:
            attention_mask = (1.0 - attention_mask[:, None, None].to(x.dtype)) * torch.finfo(x.dtype).min
        turns = angles(torch.arange(total), self.config.head_size).repeat(1, 2)[None, :, None]
        rotary_pos_emb_list, present = [[turns.cos(), turns.sin()]], []
        for layer, layer_past in zip(self.layers, past, strict=True):
            x, layer_past = layer(x, rotary_pos_emb_list, layer_past, attention_mask, use_cache)
            present.append(layer_past)
        return x, present
