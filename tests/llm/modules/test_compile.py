from functools import partial

import pytest
import torch
from torch import nn

from ipex_quant.llm import functional, modules
from ipex_quant.nn import Int8Linear, WeightOnlyQuantizedLinear
from ipex_quant.numerics import affine
from ipex_quant.numerics.int8 import quantize_per_channel
from ipex_quant.numerics.scheme import WeightScheme, WoqWeightDtype

N = 64
HEADS = {"num_head": 4, "head_dim": N, "offset": 4, "rotary_ndims": 8}


def weight_only():
    qw = affine.quantize(torch.randn(N, N), WeightScheme(WoqWeightDtype.INT4, False, 32))
    return WeightOnlyQuantizedLinear.from_quantized_weight(qw, None)


def int8():
    return Int8Linear.make_group([quantize_per_channel(torch.randn(N, N))], [None], None, torch.float32)[0]


MODULES = {
    "silu": lambda: modules.LinearSilu(nn.Linear(N, N)),
    "weight_only": lambda: modules.LinearSilu(weight_only()),
    "int8": lambda: modules.LinearSilu(int8()),
    "gate": lambda: modules.Linear2SiluMul(weight_only(), weight_only()),
    "rms": lambda: modules.RMSNorm(N),
    "layer": lambda: modules.FastLayerNorm((4, N), 1e-5, torch.randn(4, N), torch.randn(4, N)),
    "sum": lambda: lambda x: functional.add_rms_norm(x + 1, x, torch.ones(N), None, 1e-5),
    "gated": lambda: lambda x: functional.gelu_mul(x, x),
    "rotary": lambda: partial(modules.RotaryEmbedding(32, 8), position_ids=torch.arange(3)[None], **HEADS),
}


@pytest.mark.parametrize("name", MODULES)
def test_compiles_without_a_break(name):
    module, x = MODULES[name](), torch.randn(2, 3, 4, N)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))
