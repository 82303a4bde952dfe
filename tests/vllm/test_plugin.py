"""Registration: which kernels vLLM chooses, which checkpoints are claimed, and what happens in another vLLM."""

import logging

import pytest
import torch
from transformers import PretrainedConfig
from vllm.model_executor.kernels.linear import MPLinearLayerConfig, choose_mp_linear_kernel, init_int8_linear_kernel
from vllm.plugins import load_general_plugins
from vllm.scalar_type import scalar_types

import ipex_quant.integrations.vllm as plugin
from ipex_quant.integrations.vllm import saved_cache
from ipex_quant.integrations.vllm.attention import PagedBackend
from ipex_quant.integrations.vllm.config import IpexQuantConfig
from ipex_quant.integrations.vllm.linear import Int8Kernel, WoqKernel
from ipex_quant.integrations.vllm.options import chosen_parts, compute_modes
from ipex_quant.numerics.scheme import WoqActQuantMode, WoqLowpMode

GPTQ = {"quant_method": "gptq", "bits": 4, "sym": True, "desc_act": False, "group_size": 128}


@pytest.fixture(autouse=True)
def plugins():
    load_general_plugins()  # as vLLM does, by the entry point


def layer(weight_type=scalar_types.uint4b8, group_size=128, columns=256, of=256, zero_points=False):
    shapes = (of, 128), (columns, 128)
    return MPLinearLayerConfig(*shapes, weight_type, torch.bfloat16, group_size, zero_points)


@pytest.mark.parametrize(
    "config",
    [
        layer(),
        layer(scalar_types.uint4, zero_points=True),
        layer(scalar_types.uint8b128, group_size=-1),
        layer(columns=128),
    ],
)
def test_vllm_chooses_the_kernel(config):
    assert choose_mp_linear_kernel(config) is WoqKernel


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (layer(scalar_types.uint4, zero_points=False), "zero points"),
        (layer(scalar_types.uint3b4), "type"),
        (layer(group_size=96, columns=192, of=192), "power of two"),
        (layer(columns=64), "cut a group of 128"),
    ],
)
def test_refuses(config, reason):
    can, why = WoqKernel.can_implement(config)
    assert not can
    assert reason in why


def test_vllm_chooses_the_int8_kernel():
    assert isinstance(init_int8_linear_kernel(True, False, True, "test"), Int8Kernel)


def test_attention_is_ours():
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    assert AttentionBackendEnum.CPU_ATTN.get_class() is PagedBackend


def test_registering_again_changes_nothing():
    from vllm.model_executor.kernels.linear import _POSSIBLE_KERNELS
    from vllm.platforms import PlatformEnum

    before = list(_POSSIBLE_KERNELS[PlatformEnum.CPU])
    plugin.register()
    assert _POSSIBLE_KERNELS[PlatformEnum.CPU] == before
    assert before.count(WoqKernel) == 1


@pytest.mark.parametrize(
    ("change", "claimed"),
    [
        ({}, False),
        ({"sym": False}, True),
        ({"desc_act": True}, True),
        ({"bits": 8}, True),
        ({"dynamic": {r"+:.*\.0\..*": {"bits": 8}}}, True),
        ({"dynamic": {r"-:.*\.0\..*": {}}}, False),
        ({"quant_method": "awq"}, False),
    ],
)
def test_claims_what_vllm_refuses(change, claimed):
    found = IpexQuantConfig.override_quantization_method(GPTQ | change, None)
    assert found == ("ipex_quant" if claimed else None)


def test_claims_gptq_if_asked_for():
    assert IpexQuantConfig.override_quantization_method(GPTQ, "ipex_quant") == "ipex_quant"
    assert IpexQuantConfig.override_quantization_method(GPTQ | {"sym": False}, "auto_gptq") is None


@pytest.mark.parametrize("version", ["0.31.4", "0.33.0", "1.0"])
def test_does_nothing_in_another_version(version, monkeypatch, caplog):
    calls = []
    monkeypatch.setattr(plugin, "_vllm_version", lambda: version)
    monkeypatch.setattr(plugin, "_register_part", calls.append)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    plugin.register()
    assert not calls
    assert version in caplog.text
    assert "0.32" in caplog.text


def test_a_part_that_fails_leaves_the_others(monkeypatch, caplog):
    calls = []

    def register_part(part):
        calls.append(part)
        if part == "attention":
            raise ImportError("cannot import name 'CPUAttentionBackend'")

    monkeypatch.setattr(plugin, "_register_part", register_part)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    plugin.register()
    assert calls == list(plugin.PARTS)
    assert "attention" in caplog.text
    assert "CPUAttentionBackend" in caplog.text


def test_parts_are_chosen(monkeypatch):
    assert chosen_parts(plugin.PARTS) == plugin.PARTS
    monkeypatch.setenv("IPEX_QUANT_VLLM", "norms, kernels")
    assert chosen_parts(plugin.PARTS) == ("norms", "kernels")
    monkeypatch.setenv("IPEX_QUANT_VLLM", "norm")
    with pytest.raises(ValueError, match="expected some of kernels, models, attention, norms, decoder, got norm"):
        chosen_parts(plugin.PARTS)


def test_compute_modes(monkeypatch):
    assert compute_modes(4) == (WoqLowpMode.INT8, WoqActQuantMode.PER_BATCH_IC_BLOCK_SYM)
    assert compute_modes(8) == (WoqLowpMode.NONE, WoqActQuantMode.NONE)
    monkeypatch.setenv("IPEX_QUANT_VLLM_LOWP", "bf16")
    assert compute_modes(4) == (WoqLowpMode.BF16, WoqActQuantMode.NONE)
    monkeypatch.setenv("IPEX_QUANT_VLLM_LOWP", "int4")
    with pytest.raises(ValueError, match="IPEX_QUANT_VLLM_LOWP: expected one of int8, bf16, none, got 'int4'"):
        compute_modes(4)


def test_a_saved_int8_cache_needs_an_option_where_vllm_decides_itself(monkeypatch):
    messages = []
    monkeypatch.setattr(saved_cache.logger, "info_once", lambda text, *values: messages.append(text % values))
    config = {"quant_method": "ipex_quant", "kv_cache_dtype": "int8"}
    for name in ("LlamaForCausalLM", "Gemma4ForCausalLM"):
        saved_cache.log_unused(PretrainedConfig(architectures=[name], quantization_config=config))
    saved_cache.log_unused(PretrainedConfig(architectures=["Gemma4ForCausalLM"]))
    assert messages == [
        "The model was saved with an INT8 cache: pass --kv-cache-dtype int8_per_token_head to use it",
    ]
