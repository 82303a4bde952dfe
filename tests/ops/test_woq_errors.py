"""Bad arguments of `woq_linear`: a clear error, never a crash."""

from __future__ import annotations

import pytest
import torch

from ipex_quant import ops
from ipex_quant.numerics import affine
from ipex_quant.numerics.scheme import WeightScheme, WoqActQuantMode, WoqLowpMode
from ipex_quant.ops import PostOp

N, K = 10, 16
GOOD = {
    "x": torch.zeros(3, K),
    "out_features": N,
    "bias": torch.zeros(N),
    "perm": torch.arange(K, dtype=torch.int32),
    "lowp_mode": WoqLowpMode.INT8,
    "act_quant_mode": WoqActQuantMode.PER_BATCH,
    "post_op": PostOp.ADD,
    "others": (torch.zeros(3, N),),
}
BAD = [
    ({"x": torch.zeros(3, K + 1)}, "x"),
    ({"x": torch.zeros(3, 0)}, "x"),
    ({"x": torch.zeros(())}, "x"),
    ({"x": torch.zeros(3, K, dtype=torch.float64)}, "x"),
    ({"x": torch.zeros(3, K, dtype=torch.int8)}, "x"),
    ({"x": torch.zeros(3, K, dtype=torch.complex64)}, "x"),
    ({"out_features": N + 1}, "out_features"),
    ({"out_features": -1}, "out_features"),
    ({"bias": torch.zeros(N + 1)}, "bias"),
    ({"bias": torch.zeros(1)}, "bias"),
    ({"bias": torch.zeros(N, 1)}, "bias"),
    ({"bias": torch.zeros(N, dtype=torch.bfloat16)}, "bias"),
    ({"perm": torch.arange(K - 1, dtype=torch.int32)}, "perm"),
    ({"perm": torch.arange(K)}, "perm"),
    ({"perm": torch.arange(K, dtype=torch.int32) + 1}, "perm"),
    ({"perm": torch.arange(K, dtype=torch.int32) - 1}, "perm"),
    ({"lowp_mode": 4}, "lowp_mode"),
    ({"lowp_mode": -1}, "lowp_mode"),
    ({"act_quant_mode": WoqActQuantMode.NONE}, "act_quant_mode"),
    ({"act_quant_mode": 8}, "act_quant_mode"),
    ({"post_op": len(PostOp), "others": ()}, "post_op"),
    ({"post_op": -1, "others": ()}, "post_op"),
    ({"others": ()}, "others"),
    ({"others": (torch.zeros(3, N),) * 2}, "others"),
    ({"others": (torch.zeros(3, N + 1),)}, "others"),
    ({"others": (torch.zeros(N),)}, "others"),
    ({"others": (torch.zeros(3, N, dtype=torch.bfloat16),)}, "others"),
    ({"post_op": PostOp.ADD_ADD}, "others"),
    ({"post_op": PostOp.NONE}, "others"),
]


@pytest.fixture(scope="module")
def data() -> torch.Tensor:
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    return ops.pack_weight(affine.quantize(weight, WeightScheme(group_size=4))).data


def test_the_good_arguments_are_good(data: torch.Tensor) -> None:
    assert ops.woq_linear(data=data, **GOOD).shape == (3, N)


@pytest.mark.parametrize(("change", "name"), BAD, ids=[f"{i}-{name}" for i, (_, name) in enumerate(BAD)])
def test_bad_argument_is_named(data: torch.Tensor, change: dict, name: str) -> None:
    with pytest.raises((ValueError, TypeError, RuntimeError), match=name):
        ops.woq_linear(data=data, **(GOOD | change))


@pytest.mark.parametrize("bad", [torch.zeros(0, dtype=torch.uint8), torch.zeros(64, dtype=torch.uint8)])
def test_data_that_is_no_packed_weight(bad: torch.Tensor) -> None:
    with pytest.raises((ValueError, RuntimeError), match="packed"):
        ops.woq_linear(data=bad, **GOOD)


@pytest.mark.parametrize(
    "change", [lambda d: d.to(torch.int8), lambda d: d[None], lambda d: torch.stack([d, d], 1)[:, 0]]
)
def test_data_of_another_form(data: torch.Tensor, change) -> None:
    with pytest.raises((ValueError, TypeError, RuntimeError), match="packed"):
        ops.woq_linear(data=change(data), **GOOD)


@pytest.mark.parametrize("name", ["data", "bias", "perm", "others"])
def test_meta_tensor_among_cpu_tensors(data: torch.Tensor, name: str) -> None:
    """Such as a module that was left on the meta device has; a result would be memory that nobody wrote."""
    arguments = GOOD | {"data": data}
    value = arguments[name]
    arguments[name] = tuple(v.to("meta") for v in value) if name == "others" else value.to("meta")
    with pytest.raises((ValueError, RuntimeError), match=r"device|meta"):
        ops.woq_linear(**arguments)


def test_a_list_is_no_tensor(data: torch.Tensor) -> None:
    with pytest.raises((TypeError, RuntimeError, AttributeError)):
        ops.woq_linear(data=data, **(GOOD | {"x": [[0.0] * K]}))
