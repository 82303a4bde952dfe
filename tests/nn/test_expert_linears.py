import copy
import pickle

import pytest
import torch
from torch import nn
from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts

from ipex_quant import ops
from ipex_quant.nn import WeightOnlyQuantizedExpertLinears
from ipex_quant.nn.expert_linears import holds_expert_linears
from ipex_quant.numerics import affine
from ipex_quant.numerics.scheme import WeightScheme, WoqActQuantMode, WoqLowpMode, WoqWeightDtype
from ipex_quant.quantization import get_weight_only_quant_qconfig_mapping

EXPERTS, ROWS, COLUMNS = 4, 40, 96
SIZES = [3, 0, 5, 1]


def experts(shape=(EXPERTS, ROWS, COLUMNS)):
    module = JetMoeParallelExperts(shape[0], shape[2], shape[1])
    module.weight.data = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return module


def quantized(module, **options):
    options = {"weight_dtype": WoqWeightDtype.INT4, "group_size": 32, **options}
    module.qconfig = get_weight_only_quant_qconfig_mapping(**options).global_qconfig
    return WeightOnlyQuantizedExpertLinears.from_float(module)


@pytest.fixture
def x():
    return torch.randn(sum(SIZES), COLUMNS, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("rows", [1, 40, 64, 130])
@pytest.mark.parametrize("dtype", list(WoqWeightDtype))
def test_has_the_bits_of_separate_linears(x, dtype, rows):
    module = experts((EXPERTS, rows, COLUMNS))
    packed = quantized(module, weight_dtype=dtype, lowp_mode=WoqLowpMode.INT8)
    scheme, modes = packed.scheme, (WoqLowpMode.INT8, WoqActQuantMode.PER_BATCH_IC_BLOCK_SYM)
    expected = []
    for weight, own in zip(module.weight.detach(), x.split(SIZES), strict=True):
        linear = ops.pack_weight(affine.quantize(weight, scheme))
        expected.append(ops.woq_linear(own, linear.data, rows, None, None, *modes))
    assert torch.equal(packed(x, SIZES), torch.cat(expected))


def test_every_expert_is_quantized_as_a_linear(x):
    module = experts()
    packed = quantized(module)
    scheme = WeightScheme(WoqWeightDtype.INT4, False, 32)
    stack = packed.quantized_stack()
    for expert, weight in enumerate(module.weight.detach()):
        expected = affine.quantize(weight, scheme)
        assert torch.equal(stack[expert].codes, expected.codes)
        assert torch.equal(stack[expert].scales, expected.scales)
        assert torch.equal(stack[expert].zero_points, expected.zero_points)
    copied = copy.deepcopy(module)
    copied.weight.data = packed.weight.clone()
    assert packed.weight.shape == packed.weight_shape == module.weight.shape
    torch.testing.assert_close(packed(x, SIZES), copied(x, SIZES), rtol=1e-4, atol=1e-4)


def test_copies_are_equal(x):
    packed = quantized(experts())
    other = WeightOnlyQuantizedExpertLinears(packed.shape, packed.scheme)
    with pytest.raises(RuntimeError, match="has no weights yet"):
        other(x, SIZES)
    other.load_state_dict(packed.state_dict())
    for each in (other, copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(each(x, SIZES), packed(x, SIZES))
        assert each.describe() == packed.describe()
    with pytest.raises(RuntimeError, match="zero_points"):
        other.load_state_dict({name: t for name, t in packed.state_dict().items() if name != "zero_points"})


def test_gradients_reach_the_input(x):
    module = experts()
    packed, own, other = quantized(module), x.clone().requires_grad_(), x.clone().requires_grad_()
    module.weight.data = packed.weight.clone()
    packed(own, SIZES).square().sum().backward()
    module(other, SIZES).square().sum().backward()
    torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-3)


def test_no_rows_and_autocast(x):
    packed = quantized(experts())
    assert packed(x[:0], [0] * EXPERTS).shape == (0, ROWS)
    with torch.autocast("cpu", torch.bfloat16):
        result = packed(x, SIZES)
    assert torch.equal(result, packed(x.bfloat16(), SIZES))


@pytest.mark.parametrize("sizes", [[3, 0, 5], [3, 0, 5, 2]])
def test_numbers_of_rows_that_do_not_fit_are_refused(x, sizes):
    with pytest.raises(ValueError, match="expert_size: expected the rows of 4 experts, 9 in all"):
        quantized(experts())(x, sizes)


class _Scaled(JetMoeParallelExperts):
    def forward(self, inputs, expert_size):
        return 2 * super().forward(inputs, expert_size)


def test_what_is_one():
    assert holds_expert_linears(experts())
    assert not holds_expert_linears(_Scaled(4, 8, 8))
    assert not holds_expert_linears(nn.Linear(2, 2))
    assert not holds_expert_linears(nn.Conv1d(4, 4, 2, bias=False))
    with pytest.raises(ValueError, match="got a Linear"):
        WeightOnlyQuantizedExpertLinears.placeholder(nn.Linear(2, 2), quantized(experts()).describe())
