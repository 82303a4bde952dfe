import pytest
import torch
import transformers
from torch import nn

from ipex_quant.llm.casting import cast_float
from ipex_quant.nn import Int8Conv, Int8Linear, WeightOnlyQuantizedLinear
from ipex_quant.numerics import affine
from ipex_quant.numerics.int8 import StaticActivation, quantize_per_channel
from ipex_quant.numerics.scheme import WeightScheme


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


def test_tables_of_positions_are_cast():
    config = transformers.M2M100Config(
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        vocab_size=32,
        max_position_embeddings=16,
    )
    model = transformers.M2M100ForConditionalGeneration(config).eval()
    cast_float(model, torch.bfloat16)
    tokens = torch.tensor([[4, 5, 6]])
    assert model(tokens, decoder_input_ids=tokens).logits.dtype == torch.bfloat16


def test_back_to_float32():
    model = Model()
    cast_float(model, torch.bfloat16)
    cast_float(model, torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.float64}


def test_quantized_modules_report_the_dtype_and_keep_their_tensors():
    weight, activation = torch.randn(8, 4), StaticActivation(0.5, 3)
    packed = quantize_per_channel(weight), torch.randn(8)
    model = nn.Sequential(
        nn.Linear(4, 4),
        Int8Linear.make_group(*([each] for each in packed), activation, torch.float32)[0],
        WeightOnlyQuantizedLinear.from_quantized_weight(affine.quantize(weight, WeightScheme()), packed[1]),
        Int8Conv.from_float(nn.Conv2d(3, 4, 2), activation),
    )
    before = model[1:].state_dict()
    cast_float(model, torch.bfloat16)
    assert {module.weight.dtype for module in model} == {module.bias.dtype for module in model} == {torch.bfloat16}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model[1:].state_dict().items())
