import pytest
import torch

from ipex_quant.nn.functional import interaction


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_interaction(count, dtype):
    features = [torch.randn(3, 7, dtype=dtype) for _ in range(count)]
    pairs = [(i, j) for i in range(count) for j in range(i)]
    expected = torch.cat([features[0], *((features[i] * features[j]).sum(1, keepdim=True) for i, j in pairs)], dim=1)
    result = interaction(*features)
    assert result.shape == (3, 7 + count * (count - 1) // 2)
    torch.testing.assert_close(result, expected, atol=0.1 if dtype == torch.bfloat16 else 1e-12, rtol=0.01)


def test_gradients():
    features = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(interaction, features)


@pytest.mark.parametrize("features", [(), (torch.ones(2, 3), torch.ones(2, 4)), (torch.ones(3),)])
def test_features_that_do_not_fit(features):
    with pytest.raises(ValueError, match=r"features: expected tensors of one shape \[B, D\]"):
        interaction(*features)
