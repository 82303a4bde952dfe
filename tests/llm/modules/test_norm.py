import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ipex_quant.llm import functional, modules

TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 1.6e-2, "atol": 1e-2}}
K = 70


@pytest.fixture(params=TOLERANCE)
def dtype(request):
    return request.param


def rms(x, weight, eps):
    x = x.double()
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()


def close(actual, expected, dtype):
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, expected.to(dtype), **TOLERANCE[dtype])


class TestRMSNorm:
    @pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_is_its_formula(self, dtype, weight_dtype):
        x, weight = torch.randn(2, 3, K).to(dtype), torch.randn(K).to(weight_dtype)
        close(modules.RMSNorm(K, 1e-5, weight)(x), rms(x, weight, 1e-5), dtype)
        close(modules.RMSNorm.apply_function(x, weight, 1e-5), rms(x, weight, 1e-5), dtype)
        close(functional.rms_norm(x, weight, 1e-5), rms(x, weight, 1e-5), dtype)

    def test_weight_is_ones_by_default(self):
        x = torch.randn(2, K)
        norm = modules.RMSNorm(K)
        assert set(norm.state_dict()) == {"weight"}
        close(norm(x), rms(x, torch.ones(K), 1e-6), torch.float32)

    def test_shares_a_parameter(self):
        weight = nn.Parameter(torch.randn(K))
        assert modules.RMSNorm(K, weight=weight).weight is weight

    def test_rows_may_be_strided(self):
        x, weight = torch.randn(K, 5).t(), torch.randn(K)
        close(functional.rms_norm(x, weight, 1e-6), rms(x, weight, 1e-6), torch.float32)

    def test_gradient(self):
        x, weight = torch.randn(4, K), torch.randn(K)
        with torch.enable_grad():
            gradients = []
            for norm in (functional.rms_norm, rms):
                leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
                norm(*leaves, 1e-5).square().sum().backward()
                gradients.append([leaf.grad for leaf in leaves])
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)

    def test_refuses_another_width(self):
        with pytest.raises(ValueError, match=r"weight: expected shape \[70\], got \[69\]"):
            modules.RMSNorm(K, weight=torch.ones(K - 1))
        with pytest.raises(RuntimeError, match="weight"):
            modules.RMSNorm(K)(torch.randn(2, K + 1))


class TestFastLayerNorm:
    @pytest.mark.parametrize("shape", [K, (K,), (3, K), torch.Size([2, 3, K])])
    @pytest.mark.parametrize("bias", [True, False])
    def test_is_torchs(self, dtype, shape, bias):
        x = torch.randn(4, 2, 3, K).to(dtype)
        sizes = (K,) if shape == K else tuple(shape)
        weight, bias = torch.randn(sizes).to(dtype), torch.randn(sizes).to(dtype) if bias else None
        expected = F.layer_norm(x.double(), sizes, weight.double(), None if bias is None else bias.double(), 1e-5)
        close(modules.FastLayerNorm(shape, 1e-5, weight, bias)(x), expected, dtype)
        close(modules.FastLayerNorm.apply_function(x, shape, weight, bias, 1e-5), expected, dtype)
        close(functional.fast_layer_norm(x, shape, weight, bias, 1e-5), expected, dtype)

    def test_float32_vectors_norm_bfloat16(self):
        x, weight, bias = torch.randn(3, K).bfloat16(), torch.randn(K), torch.randn(K).bfloat16()
        expected = F.layer_norm(x.float(), (K,), weight, bias.float(), 1e-5)
        close(functional.fast_layer_norm(x, K, weight, bias, 1e-5), expected, torch.bfloat16)

    def test_state_dict_has_torchs_names(self):
        layer = nn.LayerNorm(K)
        norm = modules.FastLayerNorm(K, layer.eps, layer.weight, layer.bias)
        assert set(norm.state_dict()) == {"weight", "bias"}
        assert norm.weight is layer.weight

    def test_gradient(self):
        layer = nn.LayerNorm(K)
        norm, x = modules.FastLayerNorm(K, layer.eps, layer.weight, layer.bias), torch.randn(4, K)
        with torch.enable_grad():
            results = [torch.autograd.grad(module(x).square().sum(), layer.parameters()) for module in (norm, layer)]
        torch.testing.assert_close(*results)

    def test_refuses_other_shapes(self):
        x, weight = torch.randn(2, 3, K), torch.ones(3, K)
        with pytest.raises(ValueError, match=r"hidden_states: expected the last dimensions \[4, 70\]"):
            functional.fast_layer_norm(x, (4, K), None, None, 1e-5)
        with pytest.raises(ValueError, match=r"weight: expected shape \[70\], got \[3, 70\]"):
            functional.fast_layer_norm(x, K, weight, None, 1e-5)
        with pytest.raises(ValueError, match="normalized_shape: expected one or more sizes"):
            functional.fast_layer_norm(x, (), weight, None, 1e-5)


NORMS = {
    "rms": (functional.add_rms_norm, lambda x, weight, bias: rms(x, weight, 1e-5)),
    "layer": (functional.add_layer_norm, lambda x, *vectors: F.layer_norm(x.float(), (K,), *vectors, 1e-5)),
}


class TestResidualNorms:
    @pytest.mark.parametrize("kind", NORMS)
    @pytest.mark.parametrize("grad", [False, True])
    @pytest.mark.parametrize("add_back", [False, True])
    def test_norms_the_sum(self, dtype, kind, add_back, grad):
        norm, expected = NORMS[kind]
        x, residual = torch.randn(2, 3, K).to(dtype), torch.randn(2, 3, K).to(dtype)
        weight, bias = torch.randn(K), None if kind == "rms" else torch.randn(K)
        total, before = x + residual, residual.clone()
        with torch.set_grad_enabled(grad):
            result = norm(residual, x.requires_grad_(grad), weight, bias, 1e-5, add_back).detach()
        close(result, expected(total, weight, bias), dtype)
        assert torch.equal(residual.detach(), total if add_back else before)

    @pytest.mark.parametrize("kind", NORMS)
    def test_without_a_residual_norms_x(self, dtype, kind):
        norm, expected = NORMS[kind]
        x, weight = torch.randn(2, 3, K).to(dtype), torch.randn(K)
        close(norm(None, x, weight, None, 1e-5, True), expected(x, weight, None), dtype)

    @pytest.mark.parametrize("kind", NORMS)
    def test_refuses_another_residual_and_writes_nothing(self, kind):
        residual = torch.zeros(2, K, dtype=torch.bfloat16)
        with pytest.raises(ValueError, match=r"residual: expected \[2, 70\] in torch.float32"):
            NORMS[kind][0](residual, torch.randn(2, K), torch.ones(K), None, 1e-5, True)
        assert residual.eq(0).all()
        residual = torch.zeros(2, K)
        with pytest.raises(RuntimeError, match="weight"):
            NORMS[kind][0](residual, torch.randn(2, K), torch.ones(K - 1), None, 1e-5, True)
        assert residual.eq(0).all()

    def test_rms_has_no_bias(self):
        with pytest.raises(ValueError, match="bias: expected None"):
            functional.add_rms_norm(None, torch.randn(2, K), torch.ones(K), torch.ones(K), 1e-5)
