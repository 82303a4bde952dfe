"""How benchmarks/frontier.py counts bytes, and what it says is beaten."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import ipex_quant as ipex
from ipex_quant.recipes.apply import apply_recipe
from ipex_quant.recipes.recipe import load_recipe

HIDDEN, INNER, VOCABULARY = 64, 128, 96
LINEARS = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER
NORMS = 3 * HIDDEN


@pytest.fixture
def measure(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import frontier_measure

    return frontier_measure


def model(tied=False):
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_counted_by_kind(measure, tied):
    tables = VOCABULARY * HIDDEN * (1 if tied else 2)
    assert measure.weight_counts(model(tied)) == {measure.LINEARS: LINEARS, measure.TABLES: tables, measure.REST: NORMS}


def test_bytes_are_those_of_what_is_stored(measure, tmp_path):
    """Codes, scales and zero points as they are; floats have 16 bits, whatever they are in."""
    (tmp_path / "int4.yaml").write_text(
        "algorithm: rtn\nweight_dtype: int4\nweight_qscheme: asymmetric\ngroup_size: 64\nskip: [lm_head]\n"
    )
    reference = model()
    quantized = apply_recipe(load_recipe(tmp_path / "int4.yaml"), copy.deepcopy(reference), dtype=torch.float32)
    ipex.llm.save(quantized, tmp_path / "saved")
    sizes = measure.directory_sizes(tmp_path / "saved", reference, ours=True)
    assert sizes.tables_in_float
    assert sizes.bytes == {
        measure.LINEARS: LINEARS // 2 + (2 + 1) * LINEARS // 64,
        measure.TABLES: 2 * 2 * VOCABULARY * HIDDEN,
        measure.REST: 2 * NORMS,
    }


def test_another_tools_float32_scales_count_as_halves_and_no_order_as_nothing(measure, tmp_path):
    name = "model.layers.0.self_attn.q_proj"
    tensors = {
        "qweight": torch.zeros(8, 64, dtype=torch.int32),
        "scales": torch.zeros(2, 64),
        "g_idx": torch.arange(64, dtype=torch.int32) // 32,
        "bias": torch.zeros(64),
    }
    save_file({f"{name}.{key}": tensor for key, tensor in tensors.items()}, tmp_path / "model.safetensors")
    codes, scales = 8 * 64 * 4, 2 * 64
    for ours, width in ((False, 2), (True, 4)):
        sizes = measure.directory_sizes(tmp_path, model(), ours)
        assert sizes.bytes == {measure.LINEARS: codes + width * scales}
    tensors["g_idx"] = tensors["g_idx"].flip(0)
    save_file({f"{name}.{key}": tensor for key, tensor in tensors.items()}, tmp_path / "model.safetensors")
    assert measure.directory_sizes(tmp_path, model(), False).bytes == {measure.LINEARS: codes + 2 * scales + 4 * 64}


def test_bytes_that_a_producer_tells_are_by_tensor(measure, tmp_path):
    tensors = {
        "blk.0.attn_q.weight": ("Q4_K", 144, 256),
        "blk.10.ffn_down.weight": ("Q6_K", 210, 256),
        "model.layers.0.mlp.up_proj.weight": ("INT4", 130, 256),
        "token_embd.weight": ("F32", 1024, 256),
        "blk.0.attn_norm.weight": ("F32", 128, 32),
    }
    (tmp_path / "sizes.json").write_text(json.dumps(tensors))
    sizes = measure.told_sizes(tmp_path / "sizes.json")
    assert sizes.bytes == {measure.LINEARS: 484, measure.TABLES: 512, measure.REST: 64}
    assert sizes.tables_in_float
    tensors["token_embd.weight"] = ("Q8_0", 272, 256)
    (tmp_path / "sizes.json").write_text(json.dumps(tensors))
    assert not measure.told_sizes(tmp_path / "sizes.json").tables_in_float


def test_the_reference_computes_each_window_once_and_as_the_model(measure):
    plain, calls = model(), []
    plain.get_decoder().register_forward_hook(lambda *arguments: calls.append(1))
    reference = measure.Predictor(plain)
    windows = [torch.arange(5)[None], torch.arange(5, 9)[None]]
    with torch.inference_mode():
        expected = [plain(input_ids=window).logits for window in windows]
        calls.clear()
        for window, logits in zip(windows * 2, expected * 2, strict=True):
            assert torch.equal(reference(input_ids=window).logits, logits)
    assert len(calls) == 2


def test_the_frontier_is_what_nothing_smaller_beats(measure):
    import frontier_report

    records = [
        {"name": n, "size": s, "kl": k} for n, s, k in (("a", 2, 5.0), ("b", 3, 6.0), ("c", 3, 4.0), ("d", 9, 1.0))
    ]
    assert [record["name"] for record in frontier_report.frontier(records, "size")] == ["a", "c", "d"]


@pytest.fixture
def models(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import frontier_models

    return frontier_models


def test_scattered_weights_keep_no_grid_and_would_be_rounded_to_it(models):
    generator = torch.Generator().manual_seed(3)
    tied = model(tied=True)
    steps = {}
    with torch.no_grad():
        for name, weight in tied.named_parameters():
            if weight.dim() == 2:
                step = torch.rand(weight.numel() // 16, 1, generator=generator) + 0.5
                codes = torch.randint(16, (weight.numel() // 16, 16), generator=generator)
                codes[:, :2] = torch.tensor([7, 8])
                weight.copy_((codes * step - 3.3).view_as(weight))
                steps[name] = step, codes
    norms = {name: each.clone() for name, each in tied.named_parameters() if each.dim() == 1}
    models.scatter(tied)
    for name, weight in tied.named_parameters():
        if name in norms:
            assert torch.equal(weight, norms[name])
            continue
        step, codes = steps[name]
        off = (weight.detach().view(-1, 16) + 3.3) / step - codes
        assert off.abs().max() <= 0.5 + 1e-5
        assert off.std() == pytest.approx(12**-0.5, abs=0.01)


def test_equal_neighbours_have_no_grid(models):
    weight = torch.cat([torch.full((16,), 0.7), torch.arange(16) * 0.25])
    assert models.grid_steps(weight.view(2, 16)).tolist() == [[0.0], [0.25]]
