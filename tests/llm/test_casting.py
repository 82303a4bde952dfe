import pytest
import torch
from torch import nn

from ipex_quant.llm._casting import cast_float


class Model(nn.Module):
    _keep_in_fp32_modules_strict = ("router.bias",)
    _keep_in_fp32_modules = ("wo",)

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(4, 4)
        self.router = nn.Linear(4, 4)
        self.wo = nn.Linear(4, 4)
        self.exact = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.register_buffer("statistics", torch.ones(2))
        self.register_buffer("steps", torch.ones(2, dtype=torch.int64))
        self.register_buffer("frequencies", torch.ones(2), persistent=False)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.embedding.weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_cast_and_what_is_not(dtype):
    model = Model()
    cast_float(model, dtype)
    assert model.embedding.weight.dtype == model.router.weight.dtype == model.statistics.dtype == dtype
    assert model.tied.weight is model.embedding.weight
    assert model.router.bias.dtype == model.frequencies.dtype == torch.float32
    assert model.exact.dtype == torch.float64
    assert model.steps.dtype == torch.int64
    assert model.wo.weight.dtype == (torch.float32 if dtype == torch.float16 else dtype)


def test_back_to_float32():
    model = Model()
    cast_float(model, torch.bfloat16)
    cast_float(model, torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.float64}
