import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

import ipex_quant as ipex
from ipex_quant.nn.prepacked_group import GroupedLinear


class Attention(nn.Module):
    def __init__(self, branches=False, writes=False):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.branches, self.writes = branches, writes

    def forward(self, x):
        if self.branches and x.sum() > 1e9:
            return x
        q, k = self.q(x), self.k(x)
        if self.writes:
            x.add_(1)
        return self.out(q * k + self.v(x))


def grouped(model):
    return [name for name, module in model.named_modules() if isinstance(vars(module).get("forward"), GroupedLinear)]


X = torch.randn(2, 3, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_that_read_one_tensor_are_joined(dtype):
    model = nn.Sequential(Attention(), Attention()).eval()
    optimized = ipex.optimize(model, dtype=dtype, concat_linear=True)
    assert grouped(optimized) == ["0.q", "0.k", "0.v", "1.q", "1.k", "1.v"]
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    with torch.inference_mode():
        torch.testing.assert_close(optimized(X.to(dtype)).float(), model(X), rtol=tolerance, atol=tolerance)
    assert optimized.state_dict().keys() == model.state_dict().keys()
    assert grouped(ipex.optimize(optimized)) == []


def test_an_example_tells_what_tracing_cannot():
    model = Attention(branches=True).eval()
    assert grouped(ipex.optimize(model, concat_linear=True)) == []
    optimized = ipex.optimize(model, concat_linear=True, sample_input=X)
    assert grouped(optimized) == ["q", "k", "v"]
    with torch.no_grad():
        torch.testing.assert_close(optimized(X), model(X))


@pytest.mark.parametrize("sample_input", [None, X.clone()])
def test_a_tensor_that_is_written_to_is_not_shared(sample_input):
    model = Attention(writes=True).eval()
    optimized = ipex.optimize(model, concat_linear=True, sample_input=sample_input)
    with torch.inference_mode():
        torch.testing.assert_close(optimized(X.clone()), model(X.clone()))


def test_transformers_models_need_no_example():
    torch.manual_seed(0)
    model = BertModel(
        BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    ).eval()
    optimized = ipex.optimize(model, concat_linear=True)
    assert len(grouped(optimized)) == 6
    ids = torch.randint(0, 100, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(optimized(ids).last_hidden_state, model(ids).last_hidden_state, rtol=1e-4, atol=1e-5)
