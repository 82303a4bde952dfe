"""Small BERT models and ragged batches for them."""

from __future__ import annotations

import pytest
import torch
import transformers

VOCABULARY = 99
LENGTH = 9


SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 16,
}


@pytest.fixture
def small_model():
    """Makes a model in which every parameter matters: biases and norms are random too."""

    def make(kind="BertModel", **options):
        torch.manual_seed(0)
        model = getattr(transformers, kind)(transformers.BertConfig(**{**SIZES, **options})).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return model

    return make


@pytest.fixture
def batch():
    """Sequences of lengths 9, 4, 1 and 4, padded on the right, on the left, and in the middle."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.zeros(4, LENGTH, dtype=torch.long)
    mask[0] = 1
    mask[1, :4] = 1
    mask[2, -1:] = 1
    mask[3, [0, 2, 3, 7]] = 1
    return {
        "input_ids": torch.randint(VOCABULARY, (4, LENGTH), generator=generator),
        "attention_mask": mask,
        "token_type_ids": torch.randint(2, (4, LENGTH), generator=generator),
    }
