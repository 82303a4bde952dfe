import pytest
import torch
import torch.nn.functional as F

from ipex_quant.llm import functional

PRODUCTS = {
    "silu": (functional.silu_mul, {}, F.silu),
    "gelu": (functional.gelu_mul, {}, F.gelu),
    "tanh": (functional.gelu_mul, {"approximate": "tanh"}, lambda x: F.gelu(x, approximate="tanh")),
}
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 1.6e-2, "atol": 1e-2}}


@pytest.fixture(params=PRODUCTS)
def product(request):
    function, options, activation = PRODUCTS[request.param]
    return lambda *args, **kwargs: function(*args, **options, **kwargs), activation


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_is_the_product(product, dtype):
    x, y = torch.randn(2, 3, 37).to(dtype), torch.randn(2, 3, 37).to(dtype)
    result = product[0](x, y)
    assert result.dtype == dtype
    torch.testing.assert_close(result, product[1](x) * y, **TOLERANCE[dtype])


def test_writes_into_out(product):
    x, y, out = torch.randn(3, 37), torch.randn(3, 37), torch.zeros(37, 3).t()
    assert product[0](x, y, out=out) is out
    torch.testing.assert_close(out, product[1](x) * y)


def test_gradient(product):
    x, y = torch.randn(3, 37), torch.randn(3, 37)
    with torch.enable_grad():
        gradients = []
        for function in (product[0], lambda x, y: product[1](x) * y):
            leaves = x.clone().requires_grad_(), y.clone().requires_grad_()
            function(*leaves).sum().backward()
            gradients.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*gradients)


def test_refuses_what_does_not_fit(product):
    x, out = torch.randn(3, 37), torch.zeros(3, 36)
    with pytest.raises(ValueError, match=r"y: expected \[3, 37\] in torch.float32, got \[37\]"):
        product[0](x, torch.randn(37))
    with pytest.raises(ValueError, match=r"out: expected \[3, 37\]"):
        product[0](x, x, out=out)
    assert out.eq(0).all()


def test_gelu_knows_two_forms():
    with pytest.raises(ValueError, match="approximate: expected one of"):
        functional.gelu_mul(torch.randn(2), torch.randn(2), approximate="sigmoid")
