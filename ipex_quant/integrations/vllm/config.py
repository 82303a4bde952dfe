"""The quantization method ``ipex_quant`` of vLLM: directories that `ipex_quant.llm.save` wrote, and GPTQ checkpoints
that vLLM refuses: with zero points, in act-order, and of other than 4 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper

from ...conversion.description import METHOD
from .experts import ReadExpertsMethod
from .methods import ReadEmbeddingMethod, ReadHeadMethod, ReadLinearMethod, UntiedHeadMethod
from .saved_cache import log_unused
from .sources import GptqSource, SavedSource, Source


class IpexQuantConfig(QuantizationConfig):
    """What a checkpoint's `quantization_config` says; `source` reads its modules."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.source = source

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.source})"

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> IpexQuantConfig:
        """Read a `quantization_config`; raises ValueError for one that is not supported."""
        return cls(SavedSource(config) if config.get("quant_method") == METHOD else GptqSource(config))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Mapping[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Claim GPTQ checkpoints that vLLM refuses, and any if the user asks for ipex_quant."""
        if hf_quant_cfg.get("quant_method") != "gptq":
            return None
        if user_quant is None:
            return METHOD if _vllm_refuses(hf_quant_cfg) else None
        return METHOD if user_quant == METHOD else None

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        """Keep all tensors: `g_idx` is needed."""
        return WeightsMapper()

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Give modules their names in vLLM's model."""
        self.source = self.source.renamed(hf_to_vllm_mapper.map_name)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Find the quantized modules, if the configuration does not name them; logs if its cache needs an option."""
        self.source.find_modules(model_name, revision)
        log_unused(hf_config)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of a layer; None for one of no kind that is quantized."""
        source = self.source
        if isinstance(layer, LinearBase):
            names = self._names(prefix)
            if not any(name in source for name in names):
                return UnquantizedLinearMethod()
            return ReadLinearMethod(names, source.places(names), source.read)
        if isinstance(layer, ParallelLMHead):
            if prefix not in source:
                return UntiedHeadMethod()
            return ReadHeadMethod(prefix, source.places((prefix,)), source.read, source.modes(prefix))
        if isinstance(layer, VocabParallelEmbedding):
            name = source.embedding(prefix)
            if name is None:
                return None
            return ReadEmbeddingMethod(name, source.places((name,)), source.read, source.tied(name))
        if isinstance(layer, RoutedExperts) and source.has_experts(prefix):
            return ReadExpertsMethod(layer.moe_config, source, prefix)
        return None

    def _names(self, prefix: str) -> tuple[str, ...]:
        """The modules of the checkpoint that the layer `prefix` is made of."""
        parent, dot, own = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(own, [own])
        return (prefix,) if prefix in self.source else tuple(f"{parent}{dot}{part}" for part in parts)


def _vllm_refuses(config: Mapping[str, Any]) -> bool:
    """Whether vLLM raises for a GPTQ checkpoint on a CPU."""
    overrides = [each for each in (config.get("dynamic") or {}).values() if isinstance(each, Mapping)]
    act_order = any(each.get("desc_act") for each in (config, *overrides))
    bits = {each.get("bits", config.get("bits")) for each in (config, *overrides)}
    symmetric = all(each.get("sym", config.get("sym")) for each in (config, *overrides))
    layout = config.get("checkpoint_format") or "gptq"
    return act_order or bits != {4} or not symmetric or layout not in ("gptq", "gptq_v2")


def register() -> None:
    """Register the quantization method; again without effect."""
    register_quantization_config(METHOD)(IpexQuantConfig)
