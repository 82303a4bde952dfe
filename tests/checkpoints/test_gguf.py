"""GGUF's tensors under the names of a model, and blocks in safetensors."""

import pytest
import torch

from ipex_quant.checkpoints import load_low_precision_checkpoint, open_checkpoint, open_gguf, open_gguf_checkpoint
from ipex_quant.numerics.affine import dequantize

METADATA = {"general.architecture": "llama", "llama.attention.head_count": 2, "llama.attention.head_count_kv": 1}


def opened(tmp_path, write_gguf, tensors, metadata=METADATA):
    return open_gguf_checkpoint(open_gguf(write_gguf(tmp_path / "m.gguf", metadata, tensors)))


def test_rows_of_rotated_heads_come_in_halves(tmp_path, write_gguf, blocks_of):
    blocks, values = blocks_of(torch.randn(8, 32))
    state = {"blk.3.attn_q.weight": blocks, "blk.3.attn_q.bias": torch.arange(8.0), "blk.3.attn_v.weight": blocks}
    checkpoint = opened(tmp_path, write_gguf, state)
    order = [0, 2, 1, 3, 4, 6, 5, 7]  # of two heads of 4 rows, the first of each pair and then the second
    weight, bias = checkpoint["model.layers.3.self_attn.q_proj"]
    assert torch.equal(dequantize(weight), values[order])
    assert bias.tolist() == order
    assert torch.equal(dequantize(checkpoint["model.layers.3.self_attn.v_proj"][0]), values)


def test_experts_one_by_one(tmp_path, write_gguf, blocks_of):
    blocks, values = blocks_of(torch.randn(3, 8, 32))
    checkpoint = opened(tmp_path, write_gguf, {"blk.0.ffn_gate_exps.weight": blocks})
    for expert in range(3):
        weight, _ = checkpoint[f"model.layers.0.block_sparse_moe.experts.{expert}.w1"]
        assert torch.equal(dequantize(weight), values[expert])


def test_gate_and_up_in_one(tmp_path, write_gguf, blocks_of):
    blocks, values = blocks_of(torch.randn(2, 8, 32))
    metadata = {"general.architecture": "qwen3moe"}
    checkpoint = opened(tmp_path, write_gguf, {"blk.0.ffn_gate_up_exps.weight": blocks}, metadata)
    for expert in range(2):
        for part, rows in (("gate", slice(4)), ("up", slice(4, 8))):
            weight, _ = checkpoint[f"model.layers.0.mlp.experts.{expert}.{part}_proj"]
            assert torch.equal(dequantize(weight), values[expert, rows])
    with pytest.raises(ValueError, match="expected 2 parts of the same rows"):
        opened(tmp_path, write_gguf, {"blk.0.ffn_gate_up_exps.weight": torch.ones(2, 7, 4)}, metadata)


def test_columns_in_another_order_keep_their_groups(tmp_path, write_gguf, blocks_of):
    blocks, values = blocks_of(torch.randn(4, 96))
    metadata = {"general.architecture": "qwen35", "qwen35.ssm.group_count": 2, "qwen35.ssm.time_step_rank": 6}
    metadata |= {"qwen35.ssm.inner_size": 96, "qwen35.ssm.state_size": 32}
    checkpoint = opened(tmp_path, write_gguf, {"blk.0.ssm_out.weight": blocks}, metadata)
    order = [16 * head + row for head in (0, 2, 4, 1, 3, 5) for row in range(16)]
    weight, _ = checkpoint["model.layers.0.linear_attn.out_proj"]
    assert torch.equal(dequantize(weight), values[:, order])
    assert weight.scales.shape == (4, 3)


def test_an_order_has_each_column_once(blocks_of):
    (kind, raw), _ = blocks_of(torch.randn(4, 32))
    state = {f"a.{kind}": raw, "a.order": torch.full((32,), 40, dtype=torch.int32)}
    with pytest.raises(ValueError, match="order: expected each of 32 columns once"):
        open_checkpoint((state, {"quant_method": "gguf"}))["a"]


def test_layers_that_predict_further_tokens_are_left_out(tmp_path, write_gguf, blocks_of):
    blocks, _ = blocks_of(torch.randn(4, 32))
    metadata = {"general.architecture": "qwen3", "qwen3.block_count": 3, "qwen3.nextn_predict_layers": 1}
    names = [f"blk.{number}.ffn_up.weight" for number in range(3)] + ["blk.2.nextn.eh_proj.weight"]
    checkpoint = opened(tmp_path, write_gguf, dict.fromkeys(names, blocks), metadata)
    assert set(checkpoint) == {f"model.layers.{number}.mlp.up_proj" for number in range(2)}


def test_parts_that_are_no_layers_become_floats(tmp_path, write_gguf, blocks_of):
    blocks, values = blocks_of(torch.randn(8, 32))
    checkpoint = opened(tmp_path, write_gguf, {"blk.0.ffn_gate_inp.weight": blocks})
    stored = checkpoint.other_tensors()["model.layers.0.block_sparse_moe.gate.weight"]
    assert (stored.dtype, stored.shape, stored.dim()) == (torch.float32, (8, 32), 2)
    assert torch.equal(stored[...], values)
    assert torch.equal(stored[2], values[2])


def test_a_state_dict_of_a_file(tmp_path, write_gguf, blocks_of):
    blocks, values = blocks_of(torch.randn(8, 32))
    tensors = {"output.weight": blocks, "output_norm.weight": torch.ones(4)}
    path = write_gguf(tmp_path / "m.gguf", METADATA, tensors)
    state, config = load_low_precision_checkpoint(path)
    assert config == {"quant_method": "gguf"}
    assert {name: type(tensor) for name, tensor in state.items()} == {
        "lm_head.Q8_0": torch.Tensor,
        "model.norm.weight": torch.Tensor,
    }
    assert torch.equal(dequantize(open_checkpoint((state, config))["lm_head"][0]), values)
    with pytest.raises(ValueError, match="world_size: expected 1 for the GGUF file"):
        load_low_precision_checkpoint(path, 0, 2)


def test_blocks_in_safetensors(blocks_of):
    (_, raw), values = blocks_of(torch.randn(8, 64))
    state = {"a.qweight": raw}
    for config in (
        {"format": "q8_0"},
        {"bits": "q8_0", "format": "gguf"},
        {"bits": 8, "format": "q_0"},
        {"bits": 8},
        {"bits": 4, "format": "q_0"},
    ):
        weight, _ = open_checkpoint((state, config | {"quant_method": "gguf"})).quantized_weight("a", 64, 8)
        assert torch.equal(dequantize(weight), values)
    with pytest.raises(ValueError, match=r"bits, format: expected one of .*'q8_0'.*got 4, 'q9_0'"):
        open_checkpoint((state, {"quant_method": "gguf", "format": "q9_0"}))
    with pytest.raises(ValueError, match="expected blocks of one type that the configuration names"):
        open_checkpoint((state, {"quant_method": "gguf"}))["a"]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((8, 48), "Q8_0 has blocks of 32, which do not divide 48 columns"),
        ((8, 96), r"Q8_0: expected shape \[8, 102\], got \[8, 68\]"),
        ((9, 64), r"Q8_0: expected shape \[9, 68\], got \[8, 68\]"),
    ],
)
def test_blocks_fit_the_model(tmp_path, write_gguf, blocks_of, shape, message):
    blocks, _ = blocks_of(torch.randn(8, 64))
    checkpoint = opened(tmp_path, write_gguf, {"output.weight": blocks})
    with pytest.raises(ValueError, match=message):
        checkpoint.quantized_weight("lm_head", shape[1], shape[0])


def test_rows_of_no_blocks_are_refused():
    checkpoint = open_checkpoint(
        ({"a.qweight": torch.zeros(8, 0, dtype=torch.uint8)}, {"format": "iq4_nl", "quant_method": "gguf"})
    )
    with pytest.raises(ValueError, match="expected rows of whole blocks of 18 bytes, got 0"):
        checkpoint["a"]


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({}, {"general.architecture": "clip"}, "expected one of bloom, .*, got 'clip'"),
        ({}, {}, r"general\.architecture: expected a str, got None"),
        ({"blk.0.attn_w.weight": torch.ones(2)}, METADATA, r"1 tensors have no place .*'blk\.0\.attn_w\.weight'"),
        ({"blk.0.attn_q.weight": torch.ones(6, 2)}, METADATA, r"pairs of rows in 2 heads .*got 6 rows"),
        ({"blk.0.ffn_up_exps.weight": torch.ones(6)}, METADATA, r"expected a stack of experts, got shape \[6\]"),
        ({"blk.0.attn_q.weight": torch.ones(8, 2)}, METADATA | {"llama.attention.head_count": 0}, "in 0 heads"),
        (
            {"blk.0.attn_q.weight": torch.ones(8, 2)},
            METADATA | {"llama.attention.head_count": "2"},
            r"llama\.attention\.head_count: expected a int, got '2'",
        ),
    ],
)
def test_files_of_other_models(tmp_path, write_gguf, tensors, metadata, message):
    with pytest.raises(ValueError, match=message):
        opened(tmp_path, write_gguf, tensors, metadata)
