import pytest
import torch

from ipex_quant.llm import functional

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ADAPTERS, TOKENS = 3, 9
INDICES = torch.tensor([2, 0, -1, 2, 1, 0, -1, 2, 2])
STARTS, LENGTHS = torch.tensor([0, 4, 4, 5]), torch.tensor([4, 0, 1, 4])


def expected(inputs, weights, output, indices, scaling=1.0, add=False, offset=0):
    """A token at a time, in float64."""
    result = output.double()
    for token, index in enumerate(indices.tolist()):
        if index >= 0:
            product = weights[index].double() @ inputs[token].double() * scaling
            columns = slice(offset, offset + len(product))
            result[token, columns] = product + (result[token, columns] if add else 0)
    return result.to(output.dtype)


def draw(k, n, dtype=torch.float32, out=None, width=None):
    inputs, weights = torch.randn(TOKENS, k).to(dtype), torch.randn(ADAPTERS, n, k).to(dtype)
    return inputs, weights, torch.randn(TOKENS, width or n).to(out or dtype)


def close(got, wanted):
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[got.dtype]
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("width", [5, 8])
def test_shrink(dtype, index_dtype, width):
    inputs, weights, output = draw(67, 5, dtype, torch.float32, width)
    wanted = expected(inputs, weights, output, INDICES, 0.5)
    got = functional.bgmv_shrink(inputs, weights, output, INDICES.to(index_dtype), 0.5)
    assert got is output
    close(got, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden_dtype", [torch.float32, None])
@pytest.mark.parametrize("add", [True, False])
def test_expand(dtype, hidden_dtype, add):
    inputs, weights, output = draw(4, 70, dtype, width=73)
    inputs = inputs.to(hidden_dtype or dtype)
    wanted = expected(inputs, weights, output, INDICES, add=add)
    got = functional.bgmv_expand(inputs, weights[:, None], output, INDICES, add)
    assert got is output
    close(got, wanted)


def test_expand_adds_unless_told():
    inputs, weights, output = draw(4, 6)
    wanted = expected(inputs, weights, output, INDICES, add=True)
    close(functional.bgmv_expand(inputs, weights, output, INDICES), wanted)


@pytest.mark.parametrize("add", [True, False])
def test_expand_slice(add):
    inputs, weights, output = draw(4, 6, torch.bfloat16, width=20)
    wanted = expected(inputs, weights, output, INDICES, add=add, offset=7)
    got = functional.bgmv_expand_slice(inputs, weights, output, INDICES, 7, 6, add)
    assert got is output
    close(got, wanted)


def test_sequences():
    sequences = torch.tensor([1, 0, -1, 2])
    indices, ragged = torch.tensor([1, 1, 1, 1, -1, 2, 2, 2, 2]), (STARTS, LENGTHS, sequences, 4, 4)
    inputs, weights, output = draw(40, 6)
    wanted = expected(inputs, weights, output, indices, 2.0)
    close(functional.sgmv_shrink(inputs, weights, output, *ragged, 2.0), wanted)
    inputs, weights, output = draw(6, 40, width=50)
    wanted = expected(inputs, weights, output, indices)
    close(functional.sgmv_expand(inputs, weights, output, *ragged), wanted)
    wanted = expected(inputs, weights, output, indices, add=True)
    close(functional.sgmv_expand(inputs, weights, output, *ragged, True), wanted)
    wanted = expected(inputs, weights, output, indices, add=True, offset=10)
    close(functional.sgmv_expand_slice(inputs, weights, output, *ragged, 10, 40, True), wanted)


def test_no_token_and_no_adapter():
    inputs, weights, output = draw(4, 6)
    before = output.clone()
    none = torch.full((TOKENS,), -1)
    assert torch.equal(functional.bgmv_shrink(inputs, weights, output, none), before)
    assert torch.equal(functional.bgmv_shrink(inputs, weights[:0], output, none), before)
    empty = functional.bgmv_expand(inputs[:0], weights, output[:0], none[:0])
    assert empty.shape == (0, 6)


def test_bad_arguments():
    inputs, weights, output = draw(4, 6)
    before = output.clone()
    call = functional.bgmv_shrink
    with pytest.raises(ValueError, match=r"expected \[tokens, K\] and \[adapters, N, K\]"):
        call(inputs[:, :3], weights, output, INDICES)
    with pytest.raises(ValueError, match=r"output_tensor: expected \[9, 6 or more\], got \[9, 5\]"):
        call(inputs, weights, output[:, :5], INDICES)
    with pytest.raises(ValueError, match=r"lora_indices_tensor: expected integers \[9\]"):
        call(inputs, weights, output, INDICES.float())
    with pytest.raises(TypeError, match="expected float32, bfloat16 or float16"):
        call(inputs.double(), weights, output, INDICES)
    for bad in (-2, ADAPTERS):
        with pytest.raises(IndexError, match=r"expected -1\.\.2"):
            call(inputs, weights, output, INDICES.masked_fill(INDICES == 1, bad))
    with pytest.raises(ValueError, match="slice_offset, slice_size: expected 6 columns"):
        functional.bgmv_expand_slice(inputs, weights, output, INDICES, 1, 6)
    sequences = torch.tensor([1, 0, -1, 2])
    with pytest.raises(ValueError, match="seq_len_tensor: expected lengths up to 3"):
        functional.sgmv_shrink(inputs, weights, output, STARTS, LENGTHS, sequences, 4, 3, 1.0)
    with pytest.raises(ValueError, match=r"b_seq_start_loc: expected \[0, 4, 4, 5\]"):
        functional.sgmv_shrink(inputs, weights, output, STARTS + 1, LENGTHS, sequences, 4, 4, 1.0)
    assert torch.equal(output, before)
