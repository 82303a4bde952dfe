"""A transformers Llama with random weights, made quickly and without float32 copies, for engines."""

from __future__ import annotations

import torch
from engines import Shape
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights

PIECE = 1 << 20


def random_llama(shape: Shape) -> LlamaForCausalLM:
    """A bfloat16 Llama. Its weights are distinct pieces of few random numbers: OpenVINO stores equal matrices once."""
    config = LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.max_positions,
        rms_norm_eps=shape.rms_eps,
    )
    with no_init_weights():
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(2 * PIECE, generator=generator).mul_(0.02).bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1)
                continue
            for piece in parameter.view(-1).split(PIECE):
                start = torch.randint(PIECE, (), generator=generator)
                piece.copy_(numbers[start : start + len(piece)])
    return model.eval()
