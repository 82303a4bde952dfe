import pytest
import torch

from ipex_quant.bert.tokens import read_tokens

MASK = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 1, 0], [1, 0, 1]])


def test_unpadded_tokens():
    tokens = read_tokens((4, 3), MASK, unpad=True)
    x = torch.arange(24.0).view(4, 3, 2) + 1
    rows = tokens.pack(x)
    assert rows[:, 0].tolist() == [1, 3, 15, 19, 23]
    assert torch.equal(tokens.pad(rows), x * MASK[..., None])
    assert tokens.pack(torch.arange(3)[None]).tolist() == [0, 1, 1, 0, 2]
    assert tokens.lengths == [(2, 2), (0, 0), (1, 1), (2, 2)]
    assert tokens.groups == {(2, 2): [0, 3], (0, 0): [1], (1, 1): [2]}


def test_padded_tokens():
    tokens = read_tokens((4, 3), MASK, unpad=False)
    x = torch.arange(12).view(4, 3)
    assert tokens.pack(x).tolist() == list(range(12))
    assert torch.equal(tokens.pad(tokens.pack(x)), x)
    assert tokens.select_keys(tokens.pack(x)).tolist() == [0, 1, 7, 9, 11]
    assert tokens.lengths == [(3, 2), (3, 0), (3, 1), (3, 2)]


@pytest.mark.parametrize("mask", [None, torch.ones(4, 3)])
def test_nothing_to_hide(mask):
    tokens = read_tokens((4, 3), mask, unpad=True)
    assert tokens.rows is None
    assert tokens.keys is None
    assert tokens.groups == {(3, 3): [0, 1, 2, 3]}


@pytest.mark.parametrize("shape", [(3,), (4, 2), (2, 3), (4, 3, 2), (4, 3, 3, 3, 3)])
def test_other_shapes(shape):
    with pytest.raises(ValueError, match="attention_mask: expected"):
        read_tokens((4, 3), torch.ones(shape), unpad=True)
