import pytest
import torch
from transformers import AutoTokenizer

from ipex_quant.data import embedded_model_dir, held_out_text


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded_model_dir())


@pytest.fixture(scope="module")
def documents():
    return [text for text in held_out_text().split("\n\n")[:400] if text.strip()]


@pytest.fixture
def samples():
    """Token ids of models with a vocabulary of 64."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 64, (2, 24), generator=generator) for _ in range(4)]
