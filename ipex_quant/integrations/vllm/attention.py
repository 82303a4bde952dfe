"""vLLM's CPU attention with our paged kernels: caches in the model's dtype, or INT8 with a scale per token and head.

Attention with sinks, of encoders and between encoder and decoder, and FP8 caches stay vLLM's own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionMetadataBuilder, AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_interface import AttentionSpec, KVQuantMode

from ...ops.library import native
from .options import logger

INT8_CACHE = "int8_per_token_head"

_write = native.write_paged_cache.default
_attend = native.paged_attention.default
_SCALE_BYTES = 4


class PagedBackend(CPUAttentionBackend):
    """vLLM's CPU attention backend, whose layers are `PagedImpl`."""

    forward_includes_kv_cache_update = True
    supported_kv_cache_dtypes: ClassVar[list[Any]] = [
        *CPUAttentionBackend.supported_kv_cache_dtypes,
        "bfloat16",
        "float16",
        INT8_CACHE,
    ]

    @staticmethod
    def get_impl_cls() -> type[PagedImpl]:
        return PagedImpl

    @staticmethod
    def get_builder_cls() -> type[PagedBuilder]:
        return PagedBuilder

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """INT8 caches hold, for each token and head: codes of the key, their float32 scale, and the same of values."""
        if spec.kv_quant_mode != KVQuantMode.INT8_PER_TOKEN_HEAD or spec.state_content_bytes is not None:
            return super().customize_spec(spec)
        return replace(spec, state_content_bytes=spec.head_size + spec.head_size_v + 2 * _SCALE_BYTES)


class PagedBuilder(CPUAttentionMetadataBuilder):
    """Builds the metadata of a step; without a plan for vLLM's kernel if no layer of the group runs it."""

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        layers = vllm_config.compilation_config.static_forward_context
        impls = [getattr(layers[name], "impl", None) for name in layer_names]
        self._all_native = all(isinstance(impl, PagedImpl) and impl.native for impl in impls)
        if self._all_native and kv_cache_spec.kv_quant_mode == KVQuantMode.INT8_PER_TOKEN_HEAD:
            # vLLM's own takes every quantized cache for FP8, which it refuses on some CPUs.
            AttentionMetadataBuilder.__init__(self, kv_cache_spec, layer_names, vllm_config, device)
        else:
            super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CPUAttentionMetadata:
        common = common_attn_metadata
        if not self._all_native or isinstance(common.causal, torch.Tensor):
            return super().build(common_prefix_len, common, fast_build)
        return CPUAttentionMetadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            query_start_loc=common.query_start_loc,
            max_seq_len=common.max_seq_len,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            scheduler_metadata=None,
            causal=common.causal,
        )


class PagedImpl(CPUAttentionBackendImpl):
    """The attention of one layer; `native` tells whether our kernels run it.

    Raises ValueError for an INT8 cache where they do not.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.is_int8 = self.kv_cache_dtype == INT8_CACHE
        obstacle = self._obstacle()
        self.native = obstacle is None
        if obstacle is not None:
            if self.is_int8:
                raise ValueError(
                    f"kv_cache_dtype: {INT8_CACHE} is not supported with {obstacle}; choose bfloat16 or float16"
                )
            logger.info_once("vLLM's own attention runs layers with %s", obstacle)
        self._views: tuple[torch.Tensor, tuple[Any, ...]] | None = None
        window = 0 if self.sliding_window < 0 else self.sliding_window
        self._options = window, float(self.logits_soft_cap), self.alibi_slopes
        self.is_plain = not window and self.alibi_slopes is None and self.kv_sharing_target_layer_name is None

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write `key` and `value` to the cache, then attend into `output`."""
        if attn_metadata is None:  # warming up
            return output
        tokens = attn_metadata.num_actual_tokens
        writes = key is not None and value is not None and self.kv_sharing_target_layer_name is None
        if not self.native or attn_metadata.dynamic_causal is not None:
            return self._forward_stock(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale, writes
            )
        if tokens != len(query):
            query, output = query[:tokens], output[:tokens]
            if writes:
                key, value = key[:tokens], value[:tokens]
        keys, values, key_scales, value_scales = self.views(kv_cache)
        if writes:
            slots = attn_metadata.slot_mapping
            _write(
                key, value, keys, values, key_scales, value_scales, slots if len(slots) == tokens else slots[:tokens]
            )
        window, softcap, alibi = self._options
        result = _attend(
            query,
            keys,
            values,
            key_scales,
            value_scales,
            attn_metadata.block_table,
            attn_metadata.seq_lens,
            attn_metadata.query_start_loc,
            self.scale,
            attn_metadata.causal,
            window,
            softcap,
            alibi,
        )
        return output.copy_(result)

    def _forward_stock(self, layer, query, key, value, kv_cache, metadata, output, scale, block_scale, writes):
        if writes:
            self.do_kv_cache_update(layer, key, value, kv_cache, metadata.slot_mapping)
        return super().forward(layer, query, key, value, kv_cache, metadata, output, scale, block_scale)

    def _obstacle(self) -> str | None:
        """Why our kernels cannot run this layer, or None."""
        if self.attn_type != AttentionType.DECODER:
            return f"attention of the kind {self.attn_type}"
        if self.sinks is not None:
            return "attention sinks"
        if self.is_fp8_kv_cache and not self.is_int8:
            return f"a cache of {self.kv_cache_dtype}"
        return None

    def views(self, cache: torch.Tensor) -> tuple[Any, ...]:
        """Keys and values of `cache`, ``[blocks, heads, block size, head size]``, and their scales or None."""
        if self._views is None or self._views[0] is not cache:
            self._views = cache, self._cache_views(cache)
        return self._views[1]

    def _cache_views(self, cache: torch.Tensor) -> tuple[Any, ...]:
        if not self.is_int8:
            blocks, heads, size, _ = cache.shape
            keys, values = cache.view(blocks, heads, 2 * size, -1).chunk(2, dim=2)
            return keys, values, None, None
        dim = self.head_size
        parts = cache.split((dim, _SCALE_BYTES, cache.shape[3] - dim - 2 * _SCALE_BYTES, _SCALE_BYTES), dim=3)
        scales = [part.view(torch.float32).squeeze(3) for part in parts[1::2]]
        return parts[0], parts[2], *scales


def register() -> None:
    """Make `PagedBackend` vLLM's CPU attention; again without effect."""
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{PagedBackend.__module__}.{PagedBackend.__qualname__}")
