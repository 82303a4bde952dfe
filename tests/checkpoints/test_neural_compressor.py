import pytest
import torch

from ipex_quant.checkpoints import open_checkpoint
from ipex_quant.numerics.affine import dequantize
from ipex_quant.numerics.codebooks import NF4_LEVELS

CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
CODES = [7, 1, 2, 3, 4, 5, 6, 0, -8, -7, -6, -5, -4, -3, -2, -1]
"""The code of each level, from the lowest on."""


def nf4_module(rows=6, columns=64, groups=2):
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(0, 16, (rows, columns), generator=generator)
    scales = torch.rand(rows, groups, generator=generator) + 0.1
    fields = torch.tensor(CODES)[levels] & 15
    words = (fields.unflatten(1, (-1, 8)) << torch.arange(0, 32, 4)).sum(-1)
    tensors = {"qweight": torch.where(words >= 2**31, words - 2**32, words).int(), "scales": scales}
    return tensors, NF4_LEVELS[levels] * scales.repeat_interleave(columns // groups, 1)


def state_of(tensors, prefix="a.q"):
    return {f"{prefix}.{key}": tensor for key, tensor in tensors.items()}


def test_nf4_under_the_name_of_gptq():
    tensors, weight = nf4_module()
    extra = {"scale_bf16_to_fp8": torch.ones(1).bfloat16(), "bias": torch.arange(6.0)}
    checkpoint = open_checkpoint((state_of(tensors | extra), CONFIG))
    read, bias = checkpoint.quantized_weight("a.q", 64, 6)
    assert torch.equal(dequantize(read), weight)
    assert torch.equal(bias, torch.arange(6.0))
    assert checkpoint.other_tensors() == {}


def test_nf4_that_does_not_fit():
    tensors, _ = nf4_module()
    checkpoint = open_checkpoint((state_of(tensors), CONFIG))
    with pytest.raises(ValueError, match=r"a\.q\.qweight: expected shape \[6, 4\], got \[6, 8\]"):
        checkpoint.quantized_weight("a.q", 32, 6)
    narrow = tensors | {"scales": tensors["scales"][:, :1]}
    with pytest.raises(ValueError, match=r"a\.q\.scales: expected shape \[6, 2\], got \[6, 1\]"):
        open_checkpoint((state_of(narrow), CONFIG)).quantized_weight("a.q", 64, 6)


def test_awq_is_a_wrapped_linear_layer_with_factors_of_its_input(make_gptq_module):
    module, plain = make_gptq_module(4, 32, 64, 32), make_gptq_module(4, 32, 64, 32, seed=1)
    factor = torch.rand(64) + 0.5
    state = state_of(module.tensors | {"bias": torch.zeros(32)}, "a.q.linear")
    state |= {"a.q.input_scale": factor, "b.linear.weight": torch.ones(2, 2)} | state_of(plain.tensors, "a.k")
    checkpoint = open_checkpoint((state, CONFIG))
    assert set(checkpoint) == {"a.q", "a.k"}
    assert torch.equal(dequantize(checkpoint["a.q"][0]), module.weight)
    assert torch.equal(dequantize(checkpoint["a.k"][0]), plain.weight)
    assert torch.equal(checkpoint.input_factor("a.q", 64), factor)
    assert checkpoint.input_factor("a.k", 64) is None
    assert checkpoint.other_tensors().keys() == {"b.linear.weight"}
    with pytest.raises(ValueError, match=r"a\.q\.input_scale: expected 63 finite floats, got torch\.float32 \[64\]"):
        checkpoint.input_factor("a.q", 63)
