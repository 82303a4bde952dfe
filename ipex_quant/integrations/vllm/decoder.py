"""Models whose layers run in one native call where a step has few tokens, as in decoding: Llama and its like.

A layer of vLLM in eager mode calls some 25 Python functions, which cost as much as its kernels where the step has one
token. Everything else is vLLM's: longer steps, several ranks, adapters, and layers that are not what is expected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM, LlamaMLP
from vllm.model_executor.models.mistral import MistralAttention, MistralDecoderLayer, MistralForCausalLM
from vllm.model_executor.models.phi3 import Phi3ForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2Attention, Qwen2DecoderLayer, Qwen2ForCausalLM, Qwen2MLP
from vllm.model_executor.models.qwen3 import Qwen3Attention, Qwen3DecoderLayer, Qwen3ForCausalLM
from vllm.model_executor.models.registry import ModelRegistry

from ...numerics.scheme import WoqActQuantMode, WoqLowpMode
from ...ops import DecoderStructure, DecoderWeights, rms_norm
from ...ops.decoder import MAX_TOKENS
from ...ops.library import native
from .attention import PagedImpl
from .norms import NativeRMSNorm
from .options import logger
from .packed import PackedInt8Linear, PackedWoqLinear

_decoder_layers = native.decoder_layers.default
_KINDS = (QKVParallelLinear, RowParallelLinear, MergedColumnParallelLinear, RowParallelLinear)


@dataclass(frozen=True)
class Stack:
    """All layers of a model as the native op takes them."""

    attentions: tuple[Any, ...]
    weights: DecoderWeights
    structure: DecoderStructure
    cos: torch.Tensor
    sin: torch.Tensor
    rotary_dim: int

    @classmethod
    def of(cls, layers: list[torch.nn.Module]) -> Stack:
        """The stack of loaded `layers`; ValueError with a reason if they are not what the op computes."""
        for layer in layers:
            _check(layer)
        first, linears = layers[0], [linear for layer in layers for linear in _linears(layer)]
        attentions = tuple(layer.self_attn.attn for layer in layers)
        norms = [norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
        rope, impl = first.self_attn.rotary_emb, attentions[0].impl
        head_norms = [norm for layer in layers for norm in _head_norms(layer)]
        modes = {linear.modes for linear in linears} - {None}
        settings = modes, {norm.variance_epsilon for norm in (*norms, *head_norms)}
        scales = {(each.impl.scale, each.impl.logits_soft_cap) for each in attentions}
        if any(len(each) > 1 for each in (*settings, scales)) or any(
            layer.self_attn.rotary_emb is not rope for layer in layers
        ):
            raise ValueError("its layers differ in compute mode, norm, rotation or attention")
        weights = DecoderWeights(
            [linear.data for linear in linears],
            _given([linear.bias for linear in linears]),
            _given([linear.perm for linear in linears]),
            _given([linear.static_input for linear in linears]),
            [norm.weight.data for norm in norms],
            [],
            [norm.weight.data for norm in head_norms],
        )
        lowp_mode, act_quant_mode = modes.pop() if modes else (WoqLowpMode.NONE, WoqActQuantMode.NONE)
        structure = DecoderStructure(
            projections=1,
            mlp_inputs=1,
            eps=norms[0].variance_epsilon,
            lowp_mode=lowp_mode,
            act_quant_mode=act_quant_mode,
            interleaved=not rope.is_neox_style,
            scale=impl.scale,
            softcap=float(impl.logits_soft_cap),
        )
        cos, sin = (part.contiguous() for part in rope.cos_sin_cache.chunk(2, dim=-1))
        return cls(attentions, weights, structure, cos, sin, rope.rotary_dim)

    def caches(self) -> list[torch.Tensor]:
        """The parts of all caches, layer after layer; empty before vLLM makes them."""
        parts = []
        for attention in self.attentions:
            if attention.kv_cache.dim() != 4:
                return []
            parts += [part for part in attention.impl.views(attention.kv_cache) if part is not None]
        return parts

    def run(self, x: torch.Tensor, positions: torch.Tensor, pages: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """All layers for the tokens `x` ``[tokens, K]``, which are written to the caches."""
        call = (self.cos[None, positions], self.sin[None, positions], self.rotary_dim, self.caches())
        starts = [0] * len(self.attentions)
        return _decoder_layers(x[None], *self.weights, *call, starts, None, None, pages, *self.structure.arguments)[0]


class NativeSteps:
    """What the classes of `ARCHITECTURES` add to vLLM's: the native call, in eager mode."""

    model: Any
    _stack: Stack | None = None
    _looked = False

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **options: Any) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, **options)
        alone = vllm_config.lora_config is None and vllm_config.kv_transfer_config is None
        self._chosen = alone and self.model.do_not_compile

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> Any:
        """As of vLLM's class."""
        pages = None
        if self._chosen and positions.dim() == 1 and len(positions) <= MAX_TOKENS:
            pages = self._pages(len(positions))
        if pages is None:
            return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds)
        x = self.model.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        norm = self.model.norm
        return rms_norm(self._stack.run(x, positions, pages), norm.weight, norm.variance_epsilon)

    def _pages(self, tokens: int) -> tuple[torch.Tensor, ...] | None:
        """Block tables, lengths and starts of the step's sequences if the native call computes it."""
        metadata = get_forward_context().attn_metadata
        if not isinstance(metadata, dict):  # warming up, or speculating
            return None
        if not self._looked:
            self._looked, self._stack = True, self._find_stack()
        stack = self._stack
        if stack is None:
            return None
        own = metadata[stack.attentions[0].layer_name]
        one_step = all(metadata[each.layer_name] is own for each in stack.attentions)
        if not one_step or own.num_actual_tokens != tokens or own.causal is not True:
            return None
        return own.block_table, own.seq_lens, own.query_start_loc

    def _find_stack(self) -> Stack | None:
        model = self.model
        try:
            if model.start_layer or model.end_layer != len(model.layers) or model.aux_hidden_state_layers:
                raise ValueError("its layers are divided among ranks, or read by a drafter")
            _check_norms([model.norm])
            stack = Stack.of(list(model.layers))
            return stack if stack.caches() else None
        except ValueError as reason:
            logger.info("Layers run one by one in vLLM: %s", reason)
            return None


class NativeLlamaForCausalLM(NativeSteps, LlamaForCausalLM):
    """`LlamaForCausalLM`."""


class NativeMistralForCausalLM(NativeSteps, MistralForCausalLM):
    """`MistralForCausalLM`."""


class NativePhi3ForCausalLM(NativeSteps, Phi3ForCausalLM):
    """`Phi3ForCausalLM`."""


class NativeQwen2ForCausalLM(NativeSteps, Qwen2ForCausalLM):
    """`Qwen2ForCausalLM`."""


class NativeQwen3ForCausalLM(NativeSteps, Qwen3ForCausalLM):
    """`Qwen3ForCausalLM`."""


ARCHITECTURES: dict[str, type[torch.nn.Module]] = {
    "InternLM3ForCausalLM": NativeLlamaForCausalLM,
    "IQuestCoderForCausalLM": NativeLlamaForCausalLM,
    "LLaMAForCausalLM": NativeLlamaForCausalLM,
    "LlamaForCausalLM": NativeLlamaForCausalLM,
    "Ministral3ForCausalLM": NativeMistralForCausalLM,
    "MistralForCausalLM": NativeMistralForCausalLM,
    "Phi3ForCausalLM": NativePhi3ForCausalLM,
    "Qwen2ForCausalLM": NativeQwen2ForCausalLM,
    "Qwen3ForCausalLM": NativeQwen3ForCausalLM,
    "TeleChat3ForCausalLM": NativeLlamaForCausalLM,
}
"""The classes for architectures in a checkpoint's config.json."""

# A layer's class, with those of its attention and MLP: their parts have the same names, and are called in one order.
_LAYERS = {
    LlamaDecoderLayer: (LlamaAttention, LlamaMLP),
    MistralDecoderLayer: (MistralAttention, LlamaMLP),
    Qwen2DecoderLayer: (Qwen2Attention, Qwen2MLP),
    Qwen3DecoderLayer: (Qwen3Attention, Qwen2MLP),
}


def _check(layer: torch.nn.Module) -> None:
    """ValueError with a reason unless the native op computes what `layer` does."""
    attention = layer.self_attn
    if (type(attention), type(layer.mlp)) != _LAYERS.get(type(layer)):
        raise ValueError(f"{type(layer).__name__} is no layer that the native call knows")
    if getattr(attention, "do_llama_4_scaling", False) or getattr(layer, "ada_rms_norm_t_cond", None) is not None:
        raise ValueError("its queries or MLP inputs are scaled")
    if not _rotates_plainly(attention.rotary_emb):
        raise ValueError(f"its rotation is {type(attention.rotary_emb).__name__}")
    _check_norms([layer.input_layernorm, layer.post_attention_layernorm, *_head_norms(layer)])
    for module, kind, linear in zip(_modules(layer), _KINDS, _linears(layer), strict=True):
        if type(module) is not kind or module.tp_size > 1 or module.skip_bias_add:
            raise ValueError(f"{type(module).__name__} is divided among ranks, or another layer than expected")
        if not isinstance(linear, (PackedWoqLinear, PackedInt8Linear)):
            raise ValueError(f"{module.prefix} is not quantized as a whole")
    impl = layer.self_attn.attn.impl
    if not isinstance(impl, PagedImpl) or not impl.native or not impl.is_plain:
        raise ValueError("its attention has windows or slopes, or shares caches, or is not native")


def _check_norms(norms: list[torch.nn.Module]) -> None:
    for norm in norms:
        if type(norm) is not NativeRMSNorm or norm.variance_size_override is not None or not norm.has_weight:
            raise ValueError("its norms are not native")


def _rotates_plainly(rope: torch.nn.Module) -> bool:
    """Whether `rope` rotates by rows of its table, as its base class does: kinds of scaling only make other tables."""
    methods = ("forward", "forward_cpu", "forward_native")
    return isinstance(rope, RotaryEmbedding) and all(
        getattr(type(rope), name) is getattr(RotaryEmbedding, name) for name in methods
    )


def _head_norms(layer: torch.nn.Module) -> tuple[torch.nn.Module, ...]:
    """The norms of queries and keys, if it has any."""
    names = ("q_norm", "k_norm")
    return tuple(getattr(layer.self_attn, name) for name in names if hasattr(layer.self_attn, name))


def _modules(layer: torch.nn.Module) -> tuple[torch.nn.Module, ...]:
    return layer.self_attn.qkv_proj, layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj


def _linears(layer: torch.nn.Module) -> list[Any]:
    """The packed linears of a layer's modules; None for one that vLLM computes."""
    found = []
    for module in _modules(layer):
        method = getattr(module, "scheme", module.quant_method)
        found.append(getattr(getattr(method, "kernel", method), "linear", None))
    return found


def _given(tensors: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """`tensors`, or an empty list if all are None."""
    return tensors if any(tensor is not None for tensor in tensors) else []


def register() -> None:
    """Give vLLM the classes of `ARCHITECTURES`; again without effect."""
    for name, model in ARCHITECTURES.items():
        ModelRegistry.register_model(name, model)
