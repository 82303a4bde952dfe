"""Shards of GPTQ and AWQ checkpoints, dequantized and put together, are the whole weights."""

import json

import pytest
import safetensors.torch
import torch

from ipex_quant.checkpoints import open_checkpoint
from ipex_quant.llm.utils import load_low_precision_checkpoint, shard_low_precision_checkpoint
from ipex_quant.numerics.affine import dequantize

CONFIG = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 256}
SHAPES = {
    "q_proj": (256, 256),
    "k_proj": (128, 256),
    "o_proj": (256, 256),
    "up_proj": (384, 256),
    "down_proj": (256, 384),
    "qkv_proj": (512, 256),
    "gate_up_proj": (768, 256),
}
GROUP = 32


def integers(*shape):
    return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)


def checkpoint(method, act_order=False):
    torch.manual_seed(0)
    tensors = {"norm.weight": torch.randn(256), "lm_head.weight": torch.randn(96, 256)}
    for name, (rows, columns) in SHAPES.items():
        packed = (columns, rows // 8) if method == "awq" else (columns // 8, rows)
        tensors[f"layers.0.{name}.qweight"] = integers(*packed)
        tensors[f"layers.0.{name}.qzeros"] = integers(columns // GROUP, rows // 8)
        tensors[f"layers.0.{name}.scales"] = torch.rand(columns // GROUP, rows).half() + 0.1
        tensors[f"layers.0.{name}.bias"] = torch.randn(rows)
        if method == "gptq":
            g_idx = torch.arange(columns, dtype=torch.int32) // GROUP
            tensors[f"layers.0.{name}.g_idx"] = g_idx[torch.randperm(columns)] if act_order else g_idx
    config = {"quant_method": method, "bits": 4, "group_size": GROUP, "desc_act": act_order}
    return tensors, config


def shards(tensors, config, ranks, grain=64):
    arguments = config["quant_method"], grain, config["desc_act"], 4
    return [shard_low_precision_checkpoint(tensors, CONFIG, rank, ranks, *arguments) for rank in range(ranks)]


def dequantized(tensors, config):
    return {name: dequantize(weight) for name, (weight, _) in open_checkpoint((tensors, config)).items()}


@pytest.mark.parametrize(("method", "act_order"), [("gptq", False), ("gptq", True), ("awq", False)])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_shards_make_the_whole(method, act_order, ranks):
    tensors, config = checkpoint(method, act_order)
    whole = dequantized(tensors, config)
    cut = shards(tensors, config, ranks)
    parts = [dequantized(shard, config) for shard in cut]
    for name, weight in whole.items():
        layer = name.rpartition(".")[2]
        found, biases = [part[name] for part in parts], [shard[f"{name}.bias"] for shard in cut]
        if layer in ("o_proj", "down_proj"):
            assert torch.equal(torch.cat(found, dim=1), weight)
            assert all(torch.equal(bias, tensors[f"{name}.bias"]) for bias in biases)
            continue
        sizes = {"qkv_proj": [256, 128, 128], "gate_up_proj": [384, 384]}.get(layer, [len(weight)])
        shares = [[size * len(part) // len(weight) for size in sizes] for part in found]
        pieces = [part.split(share) for part, share in zip(found, shares, strict=True)]
        assert torch.equal(torch.cat([torch.cat(each) for each in zip(*pieces, strict=True)]), weight)
        assert sum(map(len, biases)) == len(weight)
    heads = torch.cat([shard["lm_head.weight"] for shard in cut], dim=1)
    assert torch.equal(heads, tensors["lm_head.weight"])
    assert all(torch.equal(shard["norm.weight"], tensors["norm.weight"]) for shard in cut)


def test_the_first_ranks_take_what_is_left():
    tensors, config = checkpoint("awq")
    rows = [shard["layers.0.q_proj.scales"].shape[1] for shard in shards(tensors, config, 3)]
    assert rows == [128, 64, 64]


def test_per_channel_scales_are_given_to_all():
    tensors = {"fc2.qweight": integers(32, 64), "fc2.scales": torch.ones(1, 64), "fc2.qzeros": integers(1, 8)}
    for shard in (shard_low_precision_checkpoint(tensors, CONFIG, rank, 2, "rtn", 64, False, 4) for rank in (0, 1)):
        assert shard["fc2.qweight"].shape == (16, 64)
        assert shard["fc2.scales"].shape == (1, 64)


def test_plain_codes():
    weight = torch.arange(64 * 16).view(64, 16)
    tensors = {"k_proj.weight": weight, "k_proj.weight_scale": torch.arange(64.0).view(64, 1)}
    cut = [shard_low_precision_checkpoint(tensors, CONFIG, rank, 4, "int8", 64, False, 8) for rank in range(4)]
    for key in tensors:
        assert torch.equal(torch.cat([shard[key] for shard in cut]), tensors[key])


def test_loading_one_rank(tmp_path):
    tensors, config = checkpoint("gptq")
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": config}))
    expected = shards(tensors, config, 2, GROUP)
    for rank in range(2):
        found, found_config = load_low_precision_checkpoint(tmp_path, rank, 2)
        assert found_config == config
        assert found.keys() == expected[rank].keys()
        assert all(torch.equal(found[key], expected[rank][key]) for key in found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "nobody's"}, "quantization_method: expected one of"),
        ({"grain": 12}, "tp_grain_size must be a multiple of 8"),
        ({"rank": 2}, "rank: expected one of 0..1, got 2 of 2"),
        ({"grain": 16}, "multiple of the group size"),
        ({"rank": 8, "ranks": 9}, "leave nothing for one of the ranks"),
    ],
)
def test_errors(changes, message):
    given = {"rank": 0, "ranks": 2, "method": "gptq", "grain": 64} | changes
    tensors, _ = checkpoint("gptq")
    for kind in (ValueError, AssertionError):
        with pytest.raises(kind, match=message):
            shard_low_precision_checkpoint(
                tensors, CONFIG, given["rank"], given["ranks"], given["method"], given["grain"], False, 4
            )
