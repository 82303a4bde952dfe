"""The INT8 cache of keys and values that a directory of `ipex_quant.llm.save` asks for, without an option for vLLM."""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.model_executor.models.registry import ModelRegistry

from ...conversion.description import METHOD
from .attention import INT8_CACHE
from .options import logger


class SavedCacheConfig(VerifyAndUpdateConfig):
    """What vLLM calls for the architectures that it has no such class of its own for."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Choose the INT8 cache if the saved model does and the user has chosen none."""
        model, cache = vllm_config.model_config, vllm_config.cache_config
        if cache.cache_dtype == "auto" and not model.use_mla and asks_for_int8(model.hf_config):
            cache.cache_dtype = INT8_CACHE
            logger.info("The cache is %s, as it was saved; --kv-cache-dtype chooses another", INT8_CACHE)


def asks_for_int8(hf_config: Any) -> bool:
    """Whether the saved model has an INT8 cache."""
    saved = getattr(hf_config, "quantization_config", None) or {}
    return saved.get("quant_method") == METHOD and saved.get("kv_cache_dtype") == "int8"


def log_unused(hf_config: Any) -> None:
    """Log what to do where the saved model has an INT8 cache and vLLM has a class of its own for its architecture."""
    if asks_for_int8(hf_config):
        classes = [MODELS_CONFIG_MAP.get(name, SavedCacheConfig) for name in hf_config.architectures or ()]
        if any(each is not SavedCacheConfig for each in classes):
            logger.info_once("The model was saved with an INT8 cache: pass --kv-cache-dtype %s to use it", INT8_CACHE)


def register() -> None:
    """Give the class to all architectures that have none; again without effect."""
    for name in ModelRegistry.get_supported_archs():
        MODELS_CONFIG_MAP.setdefault(name, SavedCacheConfig)
