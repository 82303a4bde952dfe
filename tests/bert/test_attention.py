import pytest
import torch

from ipex_quant.bert.attention import attend
from ipex_quant.bert.tokens import read_tokens

MASKS = {
    "none": None,
    "2-D": torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 1, 0, 1, 0], [1, 1, 1, 1, 1]]),
    "3-D": torch.rand(4, 5, 5, generator=torch.Generator().manual_seed(0)).round().long(),
    "4-D": torch.randn(4, 1, 5, 5, generator=torch.Generator().manual_seed(0)),
}


def states_of(tokens, dtype, grad):
    generator = torch.Generator().manual_seed(2)
    states = torch.randn(3, 4, 5, 2, 8, generator=generator).to(dtype)
    return [tokens.pack(x).requires_grad_(grad) for x in states]


def expected_attention(tokens, states, mask, scale):
    """The result for each token in turn, in float64; NaN where it sees none."""
    query, key, value = (x.detach().double() for x in states)
    places = torch.arange(20) if tokens.rows is None else tokens.rows
    sequences = places // 5
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    visible = sequences[:, None] == sequences
    if mask is not None and mask.dim() == 2:
        visible = visible & mask.bool().flatten()[places]
    if mask is not None and mask.dim() > 2:
        pairs = mask.view(4, 5, 5)[sequences[:, None], places[:, None] % 5, places % 5]
        visible, scores = (visible & pairs.bool(), scores) if mask.dim() == 3 else (visible, scores + pairs)
    weights = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, value)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("unpad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad", [False, True])
def test_values(mask, unpad, dtype, grad):
    tokens = read_tokens((4, 5), mask, unpad)
    states = states_of(tokens, dtype, grad)
    found = attend(states, tokens, 0.3, dropout=0.0)
    expected = expected_attention(tokens, states, mask, 0.3)
    assert found.dtype == dtype
    assert (found[expected.isnan()] == 0).all()
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(found.double(), expected.nan_to_num(), **tolerance)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("unpad", [False, True])
def test_gradients(mask, unpad):
    tokens = read_tokens((4, 5), mask, unpad)
    states = states_of(tokens, torch.float64, True)
    assert torch.autograd.gradcheck(lambda *states: attend(states, tokens, 0.3, dropout=0.0), states)


@pytest.mark.parametrize("mask", [torch.ones(2, 64), torch.zeros(2, 1, 64, 64)])
def test_dropout(mask):
    """With equal scores and values of 1, a result is the mean of 64 dropped ones."""
    torch.manual_seed(0)
    tokens = read_tokens((2, 64), mask, unpad=True)
    states = torch.zeros(128, 4, 8), torch.zeros(128, 4, 8), torch.ones(128, 4, 8)
    result = attend(states, tokens, 1.0, dropout=0.2)[..., 0]
    assert result.mean().item() == pytest.approx(1.0, abs=0.01)
    assert result.var().item() == pytest.approx(0.2 / 0.8 / 64, rel=0.2)
