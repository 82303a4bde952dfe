"""Bad arguments of the W8A8 ops: a clear error, never a crash."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ipex_quant import ops
from ipex_quant.numerics import affine
from ipex_quant.numerics.scheme import WeightScheme, WoqWeightDtype
from ipex_quant.ops import PostOp

N, K, ROWS = 10, 16, 3
ERRORS = (ValueError, TypeError, RuntimeError)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


GOOD = {
    "x": torch.zeros(ROWS, K, dtype=torch.uint8),
    "scales": torch.ones(ROWS),
    "zero_points": torch.zeros(ROWS, dtype=torch.int32),
    "bias": torch.zeros(N),
    "dtype": torch.bfloat16,
    "post_op": PostOp.ADD,
    "others": (torch.zeros(ROWS, N, dtype=torch.bfloat16),),
}
BAD = [
    ({"x": torch.zeros(ROWS, K + 1, dtype=torch.uint8)}, "packed"),
    ({"x": torch.zeros(ROWS, 0, dtype=torch.uint8)}, "x"),
    ({"x": torch.zeros((), dtype=torch.uint8)}, "x"),
    ({"x": torch.zeros(ROWS, K, dtype=torch.int16)}, "x"),
    ({"x": torch.zeros(ROWS, K)}, "x"),
    ({"x": torch.zeros(ROWS + 1, K, dtype=torch.uint8)}, "scales"),
    ({"scales": torch.ones(ROWS - 1)}, "scales"),
    ({"scales": torch.ones(ROWS, 1)}, "scales"),
    ({"scales": torch.ones(2 * ROWS)[::2]}, "scales"),
    ({"scales": torch.ones(ROWS, dtype=torch.float64)}, "scales"),
    ({"scales": torch.ones(1)}, "zero_points"),
    ({"zero_points": ints(0)}, "zero_points"),
    ({"zero_points": ints(0, 256, 0)}, "zero_points"),
    ({"zero_points": ints(0, -1, 0)}, "zero_points"),
    ({"zero_points": torch.zeros(ROWS, dtype=torch.int64)}, "zero_points"),
    ({"bias": torch.zeros(N + 1)}, "bias"),
    ({"bias": torch.zeros(N, 1)}, "bias"),
    ({"bias": torch.zeros(N, dtype=torch.bfloat16)}, "bias"),
    ({"post_op": len(PostOp), "others": ()}, "post_op"),
    ({"post_op": -1, "others": ()}, "post_op"),
    ({"others": ()}, "others"),
    ({"others": (torch.zeros(ROWS, N, dtype=torch.float16),)}, "others"),
    ({"post_op": PostOp.NONE}, "others"),
    ({"dtype": torch.float64}, "dtype"),
    ({"dtype": torch.uint8}, "dtype"),
    ({"others": (torch.zeros(ROWS, N),)}, "others"),
    ({"others": (torch.zeros(ROWS, N + 1, dtype=torch.bfloat16),)}, "others"),
    ({"others": (torch.zeros(N, dtype=torch.bfloat16),)}, "others"),
]


def weight(n: int, k: int = K, scheme: WeightScheme | None = None):
    values = torch.randn(n, k, generator=torch.Generator().manual_seed(0))
    return affine.quantize(values, scheme or WeightScheme())


@pytest.fixture(scope="module")
def packed() -> ops.PackedInt8:
    return ops.pack_int8([weight(N)])


@pytest.fixture(scope="module")
def group() -> ops.PackedInt8:
    return ops.pack_int8([weight(N), weight(70)])


def test_the_good_arguments_are_good(packed: ops.PackedInt8) -> None:
    (y,) = ops.int8_linear(packed=packed, **GOOD)
    assert y.shape == (ROWS, N)


@pytest.mark.parametrize(("change", "name"), BAD, ids=[f"{i}-{name}" for i, (_, name) in enumerate(BAD)])
def test_bad_argument_of_int8_linear(packed: ops.PackedInt8, change: dict, name: str) -> None:
    with pytest.raises(ERRORS, match=name):
        ops.int8_linear(packed=packed, **(GOOD | change))


@pytest.mark.parametrize("name", ["packed", "scales", "zero_points", "bias", "others"])
def test_meta_tensor_among_cpu_tensors(packed: ops.PackedInt8, name: str) -> None:
    """Such as a module that was left on the meta device has; a result would be memory that nobody wrote."""
    on_meta = {
        "packed": dataclasses.replace(packed, data=packed.data.to("meta")),
        "others": tuple(other.to("meta") for other in GOOD["others"]),
    }
    arguments = GOOD | {"packed": packed}
    arguments[name] = on_meta[name] if name in on_meta else GOOD[name].to("meta")
    with pytest.raises((ValueError, RuntimeError), match=r"device|meta"):
        ops.int8_linear(**arguments)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d[:0],
        lambda d: d[:63],
        lambda d: d[:64],
        lambda d: d[:-1],
        lambda d: torch.cat([d, d[:64]]),
        torch.zeros_like,
        lambda d: d.to(torch.int8),
        lambda d: d[None],
        lambda d: torch.stack([d, d], 1)[:, 0],
    ],
)
def test_data_that_is_no_packed_group(packed: ops.PackedInt8, change) -> None:
    broken = ops.PackedInt8(change(packed.data), packed.out_features, packed.in_features)
    with pytest.raises(ERRORS, match="packed"):
        ops.int8_linear(packed=broken, **GOOD)
    with pytest.raises(ERRORS, match="packed"):
        ops.unpack_int8(broken)


@pytest.mark.parametrize(
    ("out_features", "in_features"),
    [
        ((N,), K),
        ((70, N), K),
        ((N, 71), K),
        ((N, 64, 6), K),
        ((N, 70, 0), K),
        ((), K),
        ((N, -70), K),
        ((N, 2**31), K),
        ((2**31 - 1,) * 4, 2**31 - 1),
        ((N, 70), K + 4),
        ((N, 70), 0),
        ((N, 70), -K),
        ((N, 70), 2**31),
    ],
)
def test_sizes_of_another_group(group: ops.PackedInt8, out_features: tuple[int, ...], in_features: int) -> None:
    other = ops.PackedInt8(group.data, out_features, in_features)
    with pytest.raises(ERRORS, match=r"packed|out_features|in_features"):
        ops.unpack_int8(other)


def test_members_that_are_not_there(group: ops.PackedInt8) -> None:
    for index in (-1, 2):
        with pytest.raises(IndexError, match="index"):
            group.member(index)


def test_group_with_a_post_op(group: ops.PackedInt8) -> None:
    arguments = GOOD | {"bias": None, "others": ()}
    with pytest.raises(RuntimeError, match="post_op"):
        ops.int8_linear(packed=group, **(arguments | {"post_op": PostOp.RELU}))


def test_gated_with_bad_arguments(group: ops.PackedInt8, packed: ops.PackedInt8) -> None:
    good = {key: GOOD[key] for key in ("x", "scales", "zero_points", "dtype")} | {"bias": torch.zeros(2 * N)}
    good |= {"packed": ops.pack_int8([weight(N)] * 2), "activation": PostOp.SILU}
    ops.int8_linear_gated(**good)
    for change, name in (
        ({"packed": group}, "one size"),
        ({"packed": packed}, "two weights"),
        ({"packed": ops.PackedInt8(group.data, (N, N), K)}, "packed"),
        ({"bias": torch.zeros(N)}, "bias"),
        ({"x": GOOD["x"].float()}, "x"),
        ({"dtype": torch.int8}, "dtype"),
        ({"activation": PostOp.MUL}, "activation"),
        ({"activation": PostOp.NONE}, "activation"),
    ):
        with pytest.raises(ERRORS, match=name):
            ops.int8_linear_gated(**(good | change))


@pytest.mark.parametrize(
    "change",
    [
        {"codes": torch.zeros(N, K, dtype=torch.uint8)},
        {"codes": torch.zeros(N, 0, dtype=torch.int8)},
        {"codes": torch.zeros(N * K, dtype=torch.int8)},
        {"codes": torch.zeros(K, N, dtype=torch.int8).t()},
        {"codes": torch.zeros(N + 1, K, dtype=torch.int8)},
        {"scales": torch.ones(N + 1)},
        {"scales": torch.ones(N, 1)},
        {"scales": torch.ones(N, dtype=torch.float64)},
        {"out_features": [N + 1]},
        {"out_features": [N + 1, -1]},
        {"out_features": []},
    ],
)
def test_bad_argument_of_int8_pack(change: dict) -> None:
    good = {"codes": torch.zeros(N, K, dtype=torch.int8), "scales": torch.ones(N), "out_features": [N]}
    torch.ops.ipex_quant.int8_pack(**good)
    with pytest.raises(ERRORS, match=r"codes|scales|out_features|in_features"):
        torch.ops.ipex_quant.int8_pack(**(good | change))


def test_weights_that_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match="got none"):
        ops.pack_int8([])
    with pytest.raises(ValueError, match="same number of input features"):
        ops.pack_int8([weight(N), weight(N, K + 1)])
    for scheme in (
        WeightScheme(WoqWeightDtype.INT4),
        WeightScheme(symmetric=False),
        WeightScheme(group_size=4),
    ):
        with pytest.raises(ValueError, match="quantize them per channel"):
            ops.pack_int8([weight(N, K, scheme)])


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((torch.zeros(3, K, dtype=torch.float64), torch.ones(K), 0), "x"),
        ((torch.zeros(3, K, dtype=torch.int8), torch.ones(K), 0), "x"),
        ((torch.zeros(3, 0), torch.ones(1), 0), "x"),
        ((torch.zeros(()), torch.ones(1), 0), "x"),
        ((torch.zeros(3, K), torch.ones(K + 1), 0), "multiplier"),
        ((torch.zeros(3, K), torch.ones(0), 0), "multiplier"),
        ((torch.zeros(3, K), torch.ones(K, 1), 0), "multiplier"),
        ((torch.zeros(3, K), torch.ones(2 * K)[::2], 0), "multiplier"),
        ((torch.zeros(3, K), torch.ones(K, dtype=torch.bfloat16), 0), "multiplier"),
        ((torch.zeros(3, K), torch.ones(K), -1), "zero_point"),
        ((torch.zeros(3, K), torch.ones(K), 256), "zero_point"),
        ((torch.zeros(3, K), torch.ones(K), 2**40), "zero_point"),
    ],
)
def test_bad_argument_of_quantize_activation(arguments: tuple, name: str) -> None:
    with pytest.raises(ERRORS, match=name):
        ops.quantize_activation(*arguments)


@pytest.mark.parametrize("x", [torch.zeros(3, 0), torch.zeros(()), torch.zeros(3, K, dtype=torch.float64)])
def test_bad_argument_of_quantize_activation_per_token(x: torch.Tensor) -> None:
    with pytest.raises(ERRORS, match="x"):
        ops.quantize_activation_per_token(x)
