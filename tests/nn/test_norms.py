import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ipex_quant.nn.norms import is_norm, scaled_vectors

FACTOR = torch.tensor([0.5, 2.0, 1.0, 3.0])


def _norm(make, dtype=torch.float32):
    torch.manual_seed(0)
    norm = make(4)
    for vector in norm.parameters():
        nn.init.normal_(vector)
    return norm.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("make", "offset"), [(nn.LayerNorm, 0.0), (LlamaRMSNorm, 0.0), (GemmaRMSNorm, 1.0)])
def test_output_is_multiplied(make, offset, dtype):
    norm = _norm(make, dtype)
    x = torch.randn(3, 5, 4, dtype=dtype)
    expected = norm(x).float() * FACTOR
    scaled = scaled_vectors(norm, FACTOR, offset)
    assert scaled.keys() == dict(norm.named_parameters()).keys()
    norm.load_state_dict(scaled)
    assert norm.weight.dtype == dtype
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(norm(x).float(), expected, **close)


@pytest.mark.parametrize(("make", "offset"), [(nn.LayerNorm, 1.0), (LlamaRMSNorm, 1.0), (GemmaRMSNorm, 0.0)])
def test_an_offset_that_the_norm_does_not_have_is_noticed(make, offset):
    assert scaled_vectors(_norm(make), FACTOR, offset) is None


def test_a_factor_of_another_size():
    assert scaled_vectors(nn.LayerNorm(8), FACTOR) is None


def test_norms_are_known_by_their_vectors():
    assert is_norm(nn.LayerNorm(4))
    assert is_norm(GemmaRMSNorm(4))
    assert not is_norm(nn.LayerNorm(4, elementwise_affine=False))
    assert not is_norm(nn.LayerNorm((2, 4)))
    assert not is_norm(nn.Linear(4, 4))
