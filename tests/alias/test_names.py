"""Names of IPEX: those of its API document are there, and what is not says what to use."""

import importlib
import re

import pytest
import torch
from torch import nn

import ipex_quant
from ipex_quant.alias import IPEX, install_as_ipex, uninstall_as_ipex
from ipex_quant.alias.names import ELSEWHERE, MODULES, OBJECTS

API_DOCUMENT = {
    "": "optimize fast_bert verbose enable_onednn_fusion",
    "verbose": "VERBOSE_OFF VERBOSE_ON VERBOSE_ON_CREATION",
    "llm": "optimize",
    "llm.modules": """
        LinearSilu LinearSiluMul Linear2SiluMul LinearRelu LinearNewGelu LinearGelu LinearMul LinearAdd LinearAddAdd
        RotaryEmbedding RMSNorm FastLayerNorm IndirectAccessKVCacheAttention PagedAttention VarlenAttention
    """,
    "llm.modules.PagedAttention": "reshape_and_cache single_query_cached_kv_attention",
    "llm.functional": """
        rotary_embedding rms_norm fast_layer_norm indirect_access_kv_cache_attention varlen_attention
    """,
    "quantization": "get_smooth_quant_qconfig_mapping prepare convert autotune",
    "cpu.runtime": """
        is_runtime_ext_enabled CPUPool pin MultiStreamModuleHint MultiStreamModule Task get_core_list_of_node_id
    """,
}

SINCE = {
    "": """
        FP32MathMode OnDevice VERBOSE_OFF VERBOSE_ON VERBOSE_ON_CREATION compile disable_auto_channels_last
        enable_auto_channels_last get_fp32_math_mode optimize_transformers set_fp32_math_mode set_logging_level version
        __version__ _get_compiler_backend _set_compiler_backend _enable_dnnl _disable_dnnl
        _set_optimized_model_for_generation
    """,
    "_init_on_device": "OnDevice",
    "_C": "get_current_cpu_pool set_cpu_pool onednn_has_bf16_support onednn_has_fp16_support onednn_has_fp8_support",
    "cpu._auto_kernel_selection": "_enable_tpp _disable_tpp",
    "cpu.onednn_fusion": "enable_onednn_fusion",
    "cpu.utils.verbose": "verbose",
    "cpu.runtime": "get_default_num_streams _MultiStreamBenchmarkModule",
    "llm.functional": "add_rms_norm add_layer_norm silu_mul gelu_mul",
    "llm.functional.fusions": "bgmv_shrink bgmv_expand bgmv_expand_slice sgmv_shrink sgmv_expand sgmv_expand_slice",
    "frontend": """
        FP32MathMode disable_auto_channels_last enable_auto_channels_last get_fp32_math_mode optimize
        set_fp32_math_mode
    """,
    "llm.modules.linear_fusion": "LinearSilu LinearSiluMul Linear2SiluMul GatedMLPMOE",
    "llm.modules.mha_fusion": "RotaryEmbedding RMSNorm FastLayerNorm PagedAttention VarlenAttention MambaMixer",
    "llm.quantization.utils": "QuantDtype QuantMethod",
    "llm.quantization.woq_linear": "IPEXWeightOnlyQuantizedLinear",
    "llm.generation": "hf_greedy_search hf_sample hf_beam_search hf_beam_sample",
    "llm.modules": """
        GatedMLPMOE MambaMixer linearSilu linearSiluMul linear2SiluMul linearRelu linearNewGelu linearGelu linearMul
        linearAdd linearAddAdd
    """,
    "llm.modules.PagedAttention": "reshape_and_cache_flash flash_attn_varlen_func",
    "llm.quantization": "IPEXWeightOnlyQuantizedLinear QuantDtype QuantMethod",
    "llm.utils": "load_low_precision_checkpoint",
    "nn.functional": "interaction",
    "nn.modules": "WeightOnlyQuantizedLinear WoqWeightFormat",
    "nn.modules.weight_only_quantization": "WeightOnlyQuantizedLinear WoqWeightFormat",
    "nn.utils._lstm_convert": "replace_lstm_with_ipex_lstm",
    "nn.utils._model_convert": "replace_dropout_with_identity",
    "quantization": """
        WoqActQuantMode WoqLowpMode WoqWeightDtype WoqWeightQScheme default_dynamic_qconfig
        default_dynamic_qconfig_mapping default_static_qconfig default_static_qconfig_mapping dequantize_per_block
        dequantize_per_channel get_smooth_quant_static_qconfig get_weight_only_quant_qconfig_mapping gptq
        quantize_per_block quantize_per_channel
    """,
    "quantization._autotune": "autotune",
    "quantization._smooth_quant": "SmoothQuantActivationObserver SmoothQuantWeightObserver",
    "utils.channels_last_1d": "to_channels_last_1d is_contiguous_channels_last_1d",
}
"""What else IPEX 2.8 had and its tests and examples use."""


@pytest.fixture(scope="module")
def ipex():
    install_as_ipex()
    yield importlib.import_module(IPEX)
    uninstall_as_ipex()


def resolve(path):
    """What is at `path` below the package, through attributes alone."""
    found = importlib.import_module(IPEX)
    for name in filter(None, path.split(".")):
        found = getattr(found, name)
    return found


@pytest.mark.parametrize("table", [API_DOCUMENT, SINCE], ids=["document", "since"])
def test_every_name_is_there(ipex, table):
    for path, names in table.items():
        for name in names.split():
            assert resolve(f"{path}.{name}") is not None


def test_the_tables_lead_somewhere(ipex):
    for path in (*MODULES, *OBJECTS):
        assert resolve(path) is not None, path
    assert not ELSEWHERE.keys() & {*MODULES, *OBJECTS}


@pytest.mark.parametrize("path", ELSEWHERE)
def test_what_is_not_here_says_what_to_use(ipex, path):
    with pytest.raises(AttributeError, match=re.escape(f"{path} is not in ipex_quant: {ELSEWHERE[path]}")):
        resolve(path)
    home, _, name = f"{IPEX}.{path}".rpartition(".")
    with pytest.raises(ImportError, match=re.escape(ELSEWHERE[path])):
        exec(f"from {home} import {name}")
    for advised in re.findall(r"\bipex((?:\.\w+)+)", ELSEWHERE[path]):
        assert resolve(advised) is not None
    for advised in re.findall(r"\btorch((?:\.\w+)+)", ELSEWHERE[path]):
        assert importlib.import_module("torch") is torch
        eval(f"torch{advised}")


def test_private_functions(ipex):
    switches = ipex.cpu._auto_kernel_selection
    assert switches._enable_tpp() is switches._disable_tpp() is ipex._enable_dnnl() is None
    model = nn.Sequential(nn.Dropout(0.3), nn.LSTM(4, 4)).eval()
    x = torch.randn(2, 3, 4)
    with torch.no_grad():
        expected = model[1](x)[0]
        assert ipex.nn.utils._model_convert.replace_dropout_with_identity(model)[0].p == 0.3
        ipex.nn.utils._lstm_convert.replace_lstm_with_ipex_lstm(model, None)
        torch.testing.assert_close(model(x)[0], expected)
    mapping = ipex.quantization.get_smooth_quant_static_qconfig()
    assert isinstance(mapping, type(ipex_quant.quantization.get_smooth_quant_qconfig_mapping()))


def test_version_prints(ipex, capsys):
    ipex.version()
    assert f"torch       {torch.__version__}" in capsys.readouterr().out
