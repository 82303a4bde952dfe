"""Where this package has what IPEX had: tables of paths below ``intel_extension_for_pytorch``."""

from __future__ import annotations

VERSION = "2.8.0+ipex_quant"
"""The version of IPEX whose API this is, for callers that compare versions."""

MODULES: dict[str, str] = {
    "": "ipex_quant",
    "_C": "ipex_quant.alias.capabilities",
    "_init_on_device": "ipex_quant.settings",
    "_version": "ipex_quant.alias.version",
    "cpu._auto_kernel_selection": "ipex_quant.alias.internals",
    "cpu.onednn_fusion": "ipex_quant.settings",
    "cpu.utils": "",
    "cpu.utils.verbose": "ipex_quant.verbosity",
    "frontend": "ipex_quant",
    "llm.functional.fusions": "ipex_quant.llm.functional",
    "llm.modules.linear_fusion": "ipex_quant.llm.modules",
    "llm.modules.mha_fusion": "ipex_quant.llm.modules",
    "llm.quantization.utils": "ipex_quant.llm.quantization",
    "llm.quantization.woq_linear": "ipex_quant.llm.quantization",
    "nn.modules.weight_only_quantization": "ipex_quant.nn",
    "nn.utils": "",
    "nn.utils._lstm_convert": "",
    "nn.utils._model_convert": "ipex_quant.nn.dropout",
    "nn.utils._weight_prepack": "",
    "optim._lamb": "ipex_quant.optim",
    "optim._lars": "ipex_quant.optim",
    "quantization._autotune": "ipex_quant.quantization",
    "quantization._qconfig": "ipex_quant.quantization",
    "quantization._quantize": "ipex_quant.quantization",
    "quantization._quantize_utils": "ipex_quant.quantization",
    "quantization._smooth_quant": "ipex_quant.observers.smoothquant",
    "utils": "",
    "utils.channels_last_1d": "ipex_quant.nn.memory_format",
    "utils.weight_only_quantization": "",
}
"""IPEX's modules that are elsewhere here, and our module that has their names; "" has none but those of `OBJECTS`.

Modules that have the same path below both packages are not listed.
"""

PROGRAMS: dict[str, str] = {"cpu.launch.__main__": "ipex_quant.alias.launch"}
"""IPEX's modules for ``python -m``, and our module that runs in the place of each."""

OBJECTS: dict[str, str] = {
    "_C._amp_foreach_non_finite_check_and_unscale_": "torch:_amp_foreach_non_finite_check_and_unscale_",
    "_C.xsmm_manual_seed": "torch:manual_seed",
    "__version__": "ipex_quant.alias.names:VERSION",
    "_disable_dnnl": "ipex_quant.alias.internals:_disable_dnnl",
    "_enable_dnnl": "ipex_quant.alias.internals:_enable_dnnl",
    "_get_compiler_backend": "ipex_quant.settings.compiler:get_compiler_backend",
    "_set_compiler_backend": "ipex_quant.settings.compiler:set_compiler_backend",
    "nn.modules.WoqWeightFormat": "ipex_quant.nn:WoqWeightFormat",
    "nn.utils._lstm_convert.replace_lstm_with_ipex_lstm": "ipex_quant.alias.internals:replace_lstm_with_ipex_lstm",
    "nn.utils._weight_prepack._IPEXConv1d": "torch.nn:Conv1d",
    "nn.utils._weight_prepack._IPEXConv2d": "torch.nn:Conv2d",
    "nn.utils._weight_prepack._IPEXConv3d": "torch.nn:Conv3d",
    "nn.utils._weight_prepack._IPEXConvTranspose2d": "torch.nn:ConvTranspose2d",
    "nn.utils._weight_prepack._IPEXConvTranspose3d": "torch.nn:ConvTranspose3d",
    "nn.utils._weight_prepack._IPEXLinear": "torch.nn:Linear",
    "quantization.get_smooth_quant_static_qconfig": "ipex_quant.quantization:get_smooth_quant_qconfig_mapping",
    "utils.weight_only_quantization._woq_enable_weight_cache_for_large_batch": (
        "ipex_quant.alias.internals:enable_weight_cache"
    ),
    "version": "ipex_quant:show_config",
}
"""Names that are elsewhere here, or otherwise called: our module, a colon, our name.

Prepacked layers keep torch's classes, so that these are what IPEX's classes of them are here.
"""

_AMP = "use torch.autocast"
_EMBEDDINGS = "use torch.nn.EmbeddingBag"
_OPTIMIZE = "use ipex.optimize"
_SHARDS = "linears are not split over processes yet"
_CHECKPOINT = "ipex.llm.optimize reads GPTQ and AWQ files: low_precision_checkpoint=(state_dict, quantization_config)"

ELSEWHERE: dict[str, str] = {
    "AmpConf": _AMP,
    "AutoMixPrecision": _AMP,
    "DEVICE": "use 'cpu'",
    "_C._get_ideep_version": "use torch.__config__.show",
    "_C._get_libxsmm_version": "use torch.__config__.show",
    "_C._get_mkl_version": "use torch.__config__.show",
    "_C._jit_llga_weight_cache_enabled": "use torch.jit.onednn_fusion_enabled",
    "_C._jit_set_llga_weight_cache_enabled": "use ipex.enable_onednn_fusion",
    "_C.roc_auc_score": "use sklearn.metrics.roc_auc_score",
    "_C.roc_auc_score_all": "use sklearn.metrics.roc_auc_score",
    "_dynamo": "use torch.compile",
    "_get_auto_optimization": _OPTIMIZE,
    "_inductor": "use torch.compile, and torch._inductor",
    "_isa_help": "use torch.Tensor.to with torch.float8_e4m3fn or torch.float8_e5m2",
    "_using_dnnl": "ipex.explain tells how each layer computes",
    "amp": _AMP,
    "core": _OPTIMIZE,
    "cpu.auto_ipex": _OPTIMIZE,
    "cpu.autocast": _AMP,
    "cpu.hypertune": "use ipex.quantization.autotune, or a tuner of hyperparameters",
    "cpu.launch.CPUPoolList": "use ipex.cpu.runtime.CPUPool",
    "cpu.launch.DistributedTrainingLauncher": "use torchrun",
    "cpu.launch.Launcher": "use the command ipexrun",
    "cpu.tpp": "use ipex.fast_bert",
    "distributed": "use torch.distributed",
    "enable_auto_mixed_precision": _AMP,
    "fx": "use ipex.optimize with concat_linear=True",
    "get_auto_mix_precision": _AMP,
    "get_train": _OPTIMIZE,
    "jit": "use torch.jit",
    "nn.FrozenBatchNorm2d": "use torchvision.ops.FrozenBatchNorm2d",
    "nn.modules.FrozenBatchNorm2d": "use torchvision.ops.FrozenBatchNorm2d",
    "nn.modules.IpexWoqLinearAllreduce": _SHARDS,
    "nn.functional._embeddingbag": "use torch.nn.functional.embedding_bag",
    "nn.modules.DistMergeEmbeddingBagWithAdaGrad": _EMBEDDINGS,
    "nn.modules.IPEXLinearEltwise": "use ipex.llm.modules.LinearGelu and the others",
    "nn.modules.MergedEmbeddingBag": _EMBEDDINGS,
    "nn.modules.MergedEmbeddingBagWithAdaGrad": _EMBEDDINGS,
    "nn.modules.MergedEmbeddingBagWithCat": _EMBEDDINGS,
    "nn.modules.MergedEmbeddingBagWithSGD": _EMBEDDINGS,
    "nn.modules._roi_align": "use torchvision.ops.RoIAlign",
    "nn.modules.weight_only_quantization.IpexWoqLinearAllreduce": _SHARDS,
    "nn.modules.weight_only_quantization.IpexWoqLmHeadLinearAllreduce": _SHARDS,
    "nn.utils._model_convert._convert_awq_scales_qzeros": _CHECKPOINT,
    "nn.utils._model_convert.prepack_awq_weight": _CHECKPOINT,
    "nn.utils._model_convert.replace_customized_linear_with_linear": "ipex.llm.optimize finds linear layers itself",
    "nn.utils._parameter_wrapper": _OPTIMIZE,
    "nn.utils._weight_cast": "use ipex.optimize with dtype",
    "optim._optimizer_utils": "use ipex.optimize with an optimizer",
    "optimization": _OPTIMIZE,
    "quantization._quantize.DynamicQuantizedLinearAllreduce": _SHARDS,
    "quantization._quantize.DynamicQuantizedLinearLayer": "use ipex.nn.Int8Linear",
    "quantization._quantize.DynamicQuantizedLmHeadLinearAllreduce": _SHARDS,
    "quantization._utils": "ipex.quantization.convert raises RuntimeError before calibration",
    "quantization.fp8": "use WoqWeightDtype.FP8 for weights",
    "transformers": "use ipex.llm.optimize on models of transformers",
    "xpu": "use torch.xpu",
}
"""What IPEX had and this package has not: what to use instead."""
