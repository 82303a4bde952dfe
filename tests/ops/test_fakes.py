"""What every op does with tensors on the meta device."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from ipex_quant import ops
from ipex_quant.ops import fakes
from ipex_quant.ops.decoder import DecoderStructure

_ops = torch.ops.ipex_quant
X = torch.zeros(2, 8)
HEADS = torch.zeros(1, 2, 3, 8)
BYTES = torch.zeros(64, dtype=torch.uint8)
INDEX = torch.zeros(1, 1, dtype=torch.int32)
SIZES, CONV = torch.tensor([0, 1]), ([1, 1], [1, 1], [0, 0, 0, 0], [1, 1])
QKV, NONE = torch.zeros(1, 1, 24), torch.zeros(1, 1, 0)
HIGH, LOW = torch.zeros(4, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.int16)

CALLS = {
    "attention": (HEADS, HEADS, HEADS, 1.0, False, HEADS, 0, 0.0, None, None, None, None),
    "write_cache": (HEADS, HEADS, None, 0),
    "paged_attention": (HEADS[0], HEADS, HEADS, None, None, INDEX, SIZES[1:], SIZES, 1.0, True, 0, 0.0, None),
    "paged_rope_attention": (
        QKV[0],
        NONE,
        NONE,
        0,
        False,
        HEADS[:, :1],
        HEADS[:, :1],
        None,
        None,
        INDEX,
        SIZES[1:],
        SIZES,
        1.0,
        0,
        0.0,
        None,
    ),
    "varlen_attention": (HEADS[0], HEADS[0], HEADS[0], SIZES, SIZES, 1.0, True, 0, 0.0, None),
    "write_paged_cache": (HEADS[0], HEADS[0], HEADS, HEADS, None, None, SIZES),
    "fused_rope_attention": (
        QKV,
        NONE,
        NONE,
        0,
        False,
        HEADS[:, :1],
        HEADS[:, :1],
        None,
        None,
        0,
        1.0,
        None,
        0,
        0.0,
        None,
    ),
    "decoder_layers": (
        *(QKV, [BYTES] * 4, [], [], [], [QKV[0, 0]] * 2, [], [], NONE, NONE, 0, [HEADS, HEADS], [0], None, None, []),
        *DecoderStructure(projections=1, mlp_inputs=1).arguments,
    ),
    "float_linear": (X, X, X[:, 0], [], 0),
    "woq_pack": (X.to(torch.int8), X[:, :1], None, None, None, None, None, 8, 1, -1),
    "woq_unpack": (BYTES, INDEX[0], 1, 1, 1, -1, 0, 0),
    "woq_dequantize": (BYTES, INDEX[0], 1, 1, torch.float32),
    "woq_embedding": (BYTES, SIZES, INDEX[0], 1, torch.float32),
    "woq_linear": (X, BYTES, X[0], None, [], 4, 0, 0, 0),
    "woq_linear_group": (X, [BYTES, BYTES], [None, None], None, [4, 4], 0, 0),
    "woq_linear_gated": (X, BYTES, BYTES, None, None, None, 4, 0, 0, 4),
    "woq_experts": (X, SIZES[:, None], X[:, :1], BYTES, BYTES, None, None, None, None, 1, 1, 0, 0, 4, []),
    "quantize_activation": (X, X[0], 0),
    "int8_pack": (X.to(torch.int8), X[:, 0], [2]),
    "int8_linear": (X.to(torch.uint8), X[0, :1], INDEX[0], BYTES, None, [], [4], torch.float32, 0),
    "int8_linear_gated": (X.to(torch.uint8), X[0, :1], INDEX[0], BYTES, None, 4, torch.float32, 4),
    "int8_conv": (HEADS.to(torch.uint8), 1.0, 0, BYTES, None, 4, 1, *CONV, torch.float32),
    "int8_depthwise_conv": (HEADS.to(torch.uint8), 1.0, 0, X[:1].to(torch.int8), X[0], None, 4, *CONV, torch.float32),
    "rms_norm": (X, X[0], 1e-6),
    "layer_norm": (X, X[0], X[0], 1e-6),
    "add_rms_norm": (X, X, X[0], 1e-6),
    "add_layer_norm": (X, X, X[0], X[0], 1e-6),
    "rotary": (HEADS, HEADS[0], HEADS[0], 8, False),
    "gated_product": (X, X, 4),
    "causal_conv1d": (HEADS[0], X, X[0], HEADS[0], False),
    "causal_conv1d_update": (HEADS[0], HEADS[0], X, X[0], SIZES, False),
    "selective_scan": (HEADS, HEADS, HEADS[0], HEADS, HEADS, X, HEADS, X, False, HEADS),
    "join_halves": ([HIGH, HIGH], [LOW, LOW], torch.zeros(8)),
    "split_halves": (torch.zeros(8), [HIGH, HIGH], [LOW, LOW]),
    "sgd_halves": ([HIGH], [LOW], [HIGH], [torch.zeros(4)], 0.1, 0.9, 0.0, 0.0, 1.0, False, False, True),
}


def to_meta(value):
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), value)


@pytest.mark.parametrize("name", CALLS)
def test_one_tensor_without_data_among_others_is_refused(name: str) -> None:
    arguments = list(CALLS[name])
    places = [
        i for i, value in enumerate(arguments) if any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(value))
    ]
    assert len(places) > 1
    for place in places:
        mixed = [to_meta(value) if i == place else value for i, value in enumerate(arguments)]
        with pytest.raises(RuntimeError, match="expected all tensors on one device"):
            getattr(_ops, name)(*mixed)
    if name != "woq_pack":  # whose size depends on values
        result = getattr(_ops, name)(*to_meta(arguments))
        assert all(leaf.is_meta for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))


def test_every_op_of_several_tensors_is_among_them() -> None:
    schemas = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("ipex_quant::")]
    takes = {s.name.split("::")[1]: sum("Tensor" in str(a.type) for a in s.arguments) for s in schemas}
    backward = {"woq_experts_backward", "int8_dequantize", "int8_conv_dequantize"}
    assert {name for name, count in takes.items() if count > 1} - backward - CALLS.keys() == set()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.attention(*to_meta((HEADS[0], HEADS, HEADS)), scale=1.0), r"query: expected \[B, H, Lq, D\]"),
        (lambda: _ops.float_linear(*to_meta((X, X[:, :4])), None, [], 0), r"x: expected \[..., K\]"),
        (lambda: ops.rms_norm(*to_meta((X, X[0, :4])), 1e-6), r"weight: expected \[8\]"),
        (lambda: ops.rotary(*to_meta((X, HEADS[0], HEADS[0]))), r"x: expected \[B, L, H, D\]"),
        (lambda: _ops.gated_product(*to_meta((X, X[:1])), 4), "y: expected the shape of x"),
    ],
)
def test_shapes_are_checked_without_data_too(call, message) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()


def test_check_shape() -> None:
    fakes.check_shape("x", X, "[M, K]")
    with pytest.raises(RuntimeError, match=r"x: expected \[K\], got \[2, 8\]"):
        fakes.check_shape("x", X, "[K]")
