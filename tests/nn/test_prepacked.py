import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ipex_quant import ops
from ipex_quant.nn import prepacked
from ipex_quant.nn.prepacked import Derived, PrepackedLinear, compute_dtype, prepack, restore_prepacked

LOW = (torch.bfloat16, torch.float16)


@pytest.fixture
def linear():
    torch.manual_seed(0)
    layer = nn.Linear(24, 10).eval()
    prepack(PrepackedLinear(layer))
    return layer


def packs(layer):
    return layer.forward._weight._made is not None


def close(actual, expected):
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.003}[actual.dtype]
    torch.testing.assert_close(actual.float(), expected.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(17,), (1, 17), (3, 17), (40, 17), (2, 5, 7, 17), (0, 17)])
def test_a_linear_layer_computes_what_it_did(shape, bias, dtype):
    torch.manual_seed(0)
    layer, x = nn.Linear(17, 9, bias), torch.randn(shape)
    expected = layer(x)
    layer.to(dtype)
    prepack(PrepackedLinear(layer))
    with torch.no_grad():
        for given in (x.to(dtype), x.to(dtype).expand(2, *shape).transpose(0, -2) if len(shape) > 2 else x.to(dtype)):
            actual = layer(given)
            assert actual.dtype == dtype
    with torch.inference_mode():
        close(layer(input=x.to(dtype)), expected)
    assert layer.extra_repr() == nn.Linear(17, 9, bias).extra_repr()


@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
def test_few_rows_need_no_copy_of_the_weight(linear, dtype):
    linear.to(dtype)
    for shape in ((24,), (1, 24), (2, 1, 24)):
        x = torch.randn(shape).to(dtype)
        with torch.no_grad():
            for given in (x, x.float()):
                assert torch.equal(linear(given), ops.float_linear(x, linear.weight, linear.bias))
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                assert torch.equal(linear(x.float()), ops.float_linear(x, linear.weight, linear.bias))
            linear.weight.data.mul_(2)  # which no version counts
    assert not packs(linear)
    with torch.no_grad():
        linear(torch.randn(50, 24).to(dtype))
    assert packs(linear)


def test_transposed_inputs(linear):
    x = torch.randn(24, 30).t()
    with torch.no_grad():
        close(linear(x), F.linear(x.contiguous(), linear.weight, linear.bias))


def in_place(layer):
    with torch.no_grad():
        layer.weight.mul_(2)
        layer.bias.add_(1)


def replaced(layer):
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))


def data_replaced(layer):
    layer.weight.data = layer.weight.data * 3


def loaded(layer):
    layer.load_state_dict(nn.Linear(24, 10).state_dict())


def assigned(layer):
    layer.load_state_dict(nn.Linear(24, 10).state_dict(), assign=True)


def rounded(layer):
    layer.half().float()


def trained(layer):
    layer.weight.grad = torch.ones_like(layer.weight)
    torch.optim.SGD([layer.weight], 0.5).step()


def doubled_elsewhere(layer):
    layer.double().float()
    with torch.no_grad():
        layer.weight[0] += 1


@pytest.mark.parametrize(
    "change", [in_place, replaced, data_replaced, loaded, assigned, rounded, trained, doubled_elsewhere]
)
def test_a_change_of_the_parameters_is_noticed(linear, change):
    x = torch.randn(30, 24)
    with torch.no_grad():
        before = linear(x)
    assert packs(linear)
    change(linear)
    with torch.no_grad():
        after = linear(x)
    assert not torch.equal(before, after)
    close(after, F.linear(x, linear.weight, linear.bias))


def test_parameters_of_inference_mode():
    with torch.inference_mode():
        layer, x = nn.Linear(24, 10), torch.randn(30, 24)
        prepack(PrepackedLinear(layer))
        for factor in (1, 2):
            layer.weight.mul_(factor)
            close(layer(x), F.linear(x, layer.weight, layer.bias))


def test_a_copy_has_its_own_weight(linear):
    x = torch.randn(30, 24)
    with torch.no_grad():
        expected = linear(x)
        other = copy.deepcopy(linear)
        assert not packs(other)
        assert other.forward.module is other
        other.weight.zero_()
        assert torch.equal(other(x), linear.bias.expand(30, 10))
        assert torch.equal(linear(x), expected)
    assert set(linear.state_dict()) == {"weight", "bias"}


@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
def test_gradients(linear, dtype):
    stock = nn.Linear(24, 10)
    stock.load_state_dict(linear.state_dict())
    linear.to(dtype)
    x, y = torch.randn(30, 24, requires_grad=True), torch.randn(30, 10)
    low = x.detach().to(dtype).requires_grad_()
    (stock(x) * y).sum().backward()
    (linear(low) * y.to(dtype)).sum().backward()
    close(low.grad, x.grad)
    close(linear.weight.grad / 10, stock.weight.grad / 10)
    assert linear.weight.grad.dtype == linear.bias.grad.dtype == dtype


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("of", [torch.float32, *LOW])
def test_autocast(linear, of, dtype):
    x = torch.randn(30, 24)
    expected = F.linear(x, linear.weight, linear.bias)
    linear.to(of)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled), torch.autocast("cpu", dtype):
            actual = linear(x)
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.float(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", LOW)
def test_a_layer_in_lower_precision_takes_float32(linear, dtype):
    x = torch.randn(30, 24)
    expected = F.linear(x, linear.weight, linear.bias)
    linear.to(dtype)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            close(linear(x), expected)
            assert linear(x).dtype == dtype


def test_arguments_that_do_not_fit_are_refused_as_before(linear):
    for x in (
        torch.randn(30, 23),
        torch.randn(()),
        torch.randn(30, 24).bfloat16(),
        torch.ones(30, 24, dtype=torch.int),
    ):
        with torch.no_grad(), pytest.raises(RuntimeError):
            linear(x)
    with pytest.raises(TypeError):
        linear(torch.randn(30, 24), 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transforms_and_scripts_see_operators_of_torch(linear, dtype):
    x = torch.randn(4, 30, 24).to(dtype)
    linear.to(dtype).requires_grad_(False)
    expected = linear(x)
    close(torch.vmap(linear)(x), expected)
    close(torch.func.functional_call(linear, {"weight": linear.weight * 0}, (x,)), linear.bias.expand(4, 30, 10))
    close(torch.jit.trace(linear, x)(x), expected)
    close(torch.compile(linear, backend="aot_eager", fullgraph=True)(x), expected)
    close(torch.jit.script(linear)(x), expected)
    assert isinstance(linear.forward, PrepackedLinear)


def test_restoring(linear):
    model = nn.Sequential(linear)
    restore_prepacked(model)
    assert vars(linear).keys() == vars(nn.Linear(24, 10)).keys()


def test_threads_share_a_layer(linear):
    x = torch.randn(30, 24)
    expected = F.linear(x, linear.weight, linear.bias)

    def run(_):
        with torch.no_grad():
            return linear(x)

    with ThreadPoolExecutor(4) as pool:
        for actual in pool.map(run, range(16)):
            close(actual, expected)


def test_derived_is_made_again_only_if_something_changed():
    source, derived, made = torch.ones(3), Derived(), []

    def get(key=0):
        return derived.of([source], key, lambda: made.append(key) or len(made))

    assert [get(), get(), get(1), get(1)] == [1, 1, 2, 2]
    assert derived.holds([source], 1)
    assert not derived.holds([source], 0)
    source.add_(1)
    assert not derived.holds([source], 1)
    assert get(1) == 3


def test_dtypes_that_the_cpu_multiplies_are_not_converted(monkeypatch):
    assert compute_dtype(torch.float32) == torch.float32
    monkeypatch.setattr(prepacked, "_SLOW", frozenset((torch.float16,)))
    assert compute_dtype(torch.bfloat16) == torch.bfloat16
    assert compute_dtype(torch.float16) == torch.float32
