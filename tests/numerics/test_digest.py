import pytest
import torch

from ipex_quant.numerics.digest import tensor_digest

DTYPES = [torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.int64, torch.float64, torch.complex64]


def tensors(dtype=torch.float32):
    return {"a": torch.arange(6000).reshape(3, 2000).to(dtype), "b": torch.ones((), dtype=dtype), "other": "text"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_one_value_counts(dtype):
    expected = tensor_digest(tensors(dtype).items())
    assert tensor_digest(tensors(dtype).items()) == expected
    for place in ((0, 0), (1, 77), (2, 1999)):
        changed = tensors(dtype)
        changed["a"][place] = 1 if changed["a"][place] == 0 else 0
        assert tensor_digest(changed.items()) != expected


def test_names_shapes_and_dtypes_count():
    a = torch.zeros(2, 3)
    digests = {
        tensor_digest([("a", each)]) for each in (a, a.t(), a.reshape(6), a.int(), a.double(), a[:0], torch.zeros(()))
    }
    assert len({*digests, tensor_digest([("b", a)]), tensor_digest([])}) == 9


def test_the_number_of_threads_does_not_count():
    values = [("a", torch.randn(1 << 18))]
    expected, threads = tensor_digest(values), torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert tensor_digest(values) == expected
    finally:
        torch.set_num_threads(threads)
