"""All layers of a decoder in one native call, for the few tokens of a decode step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import output_capturing

from ...nn.fused_forward import FusedForward, restore_forwards
from ...ops.decoder import MAX_TOKENS
from ..cache.naming import CACHE
from ..cache.paged import PagedCache
from .call import LayerCall
from .layer import FusedLayer
from .step import LayerStep
from .watched_forward import has_hooks

MODELS = (
    "CohereModel",
    "GlmModel",
    "LlamaModel",
    "MistralModel",
    "OlmoModel",
    "Phi3Model",
    "Qwen2Model",
    "Qwen3Model",
    "SmolLM3Model",
)
"""Classes whose `forward` only embeds, masks, computes positions, calls the layers in order and applies the last norm.

`StepLayer.common` decides whether the layers of such a model can be computed in one call.
"""


def fuse_model(model: nn.Module) -> list[str]:
    """Let every model in `model` whose class is in `MODELS` compute all its fused layers in one native call.

    Returns the names of these models. One call computes a few tokens with native caches, of padded sequences
    one each, if nothing asks for the hidden states or attention weights of single layers. `restore_forwards` undoes it.
    """
    restore_forwards(model, FusedModel)
    names = []
    for name, module in model.named_modules():
        known = type(module).__name__ in MODELS and "forward" not in vars(module)
        if known and getattr(module.config, "sliding_window", None) is None:
            module.forward = FusedModel(module)
            names.append(name)
    return names


class FusedModel(FusedForward):
    """Replaces the `forward` of a model, with the same arguments and results."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.angles = Angles(model.rotary_emb)
        self.plan = Plan([], None)  # one attribute, read once, since several threads may call the model
        self._find_step()

    @property
    def step(self) -> LayerStep | None:
        """The step that computes all layers in one call, as of the last call; None if there is none."""
        return self.plan.step

    def __call__(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Any = None,
        **others: Any,
    ) -> Any:
        hidden = None
        cache = past_key_values if cache is None else cache
        paged = isinstance(cache, PagedCache)  # whose engine asks for no other cache
        one_input = (input_ids is None) != (inputs_embeds is None)
        if one_input and cache is not None and self._suits(True if paged else use_cache, others):
            hidden = self._all_layers(input_ids, inputs_embeds, attention_mask, position_ids, cache)
        if hidden is not None:
            return BaseModelOutputWithPast(last_hidden_state=self.model.norm(hidden), **{CACHE: cache})
        return type(self.model).forward(
            self.model,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{CACHE: cache},
            **others,
        )

    def _suits(self, use_cache: bool | None, others: Mapping[str, Any]) -> bool:
        """Whether the call is inference with a cache, asks only for hidden states, and has no argument to ignore."""
        model, config = self.model, self.model.config
        if model.training or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.jit.is_tracing():
            return False
        if not (config.use_cache if use_cache is None else use_cache):
            return False
        if others.get("return_dict", config.return_dict) is False:
            return False
        if config.output_hidden_states or config.output_attentions:
            return False
        return all(value is None or value is False or name == "return_dict" for name, value in others.items())

    def _all_layers(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Any,
    ) -> torch.Tensor | None:
        """Hidden states after the last layer; None, with nothing computed, if the layers must be called one by one."""
        model = self.model
        batch, length = (inputs_embeds if input_ids is None else input_ids).shape[:2]
        step = self._find_step() if batch * length <= MAX_TOKENS else None
        if step is None:
            return None
        past, mask = cache.get_seq_length(), None
        if attention_mask is not None:
            if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
                return None
            if attention_mask.shape[1] != past + length:
                return None
            # Traced code cannot depend on values.
            if torch.compiler.is_compiling() or not attention_mask.all():
                if length > 1:
                    return None
                mask = attention_mask[:, None, None].bool()
        x = model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if any(parameters["weight"].dtype != x.dtype for parameters in step.find_tensors().norms):
            return None
        return step(x, LayerCall(mask, cache, self.angles(x, past, length, position_ids)))

    def _find_step(self) -> LayerStep | None:
        """The step that computes all layers; None if a layer is not fused, was changed or has a hook."""
        modules = self.model.layers._modules.values()  # slices of the list itself are slow
        if len(modules) != self.model.config.num_hidden_layers:
            return None
        if torch.compiler.is_compiling():
            layers = [module.__dict__.get("forward") for module in modules]
            same = [id(layer) for layer in layers] == self._ids()
            return self.plan.step if same and not any(layer.is_changed() for layer in layers) else None
        layers = []
        for module in modules:
            attributes = module.__dict__
            hooked = attributes["_forward_hooks"] or attributes["_forward_pre_hooks"]
            if hooked and (has_hooks(module) or output_capturing._active_collector.get()):
                return None
            layers.append(attributes.get("forward"))
        plan = self.plan
        if layers != plan.layers:
            steps = [layer.step if isinstance(layer, FusedLayer) else None for layer in layers]
            plan = Plan(layers, None if None in steps or not steps else LayerStep.joined(steps))
            self.plan = plan
        return None if plan.step is None or any(layer.is_changed() for layer in layers) else plan.step

    @torch.compiler.assume_constant_result
    def _ids(self) -> list[int]:
        """Ids of the layers' forwards, constant in a traced graph; empty if one call cannot compute the layers."""
        modules = self.model.layers._modules.values()
        hooked = any(module._forward_hooks or module._forward_pre_hooks for module in modules)
        plan = self.plan
        return [] if hooked or plan.step is None else [id(layer) for layer in plan.layers]


class Plan(NamedTuple):
    """The forwards of all layers, and the step that computes them in one call, if there is one."""

    layers: list[Any]
    step: LayerStep | None


class Tables(NamedTuple):
    """Cosines and sines of one block of positions, with the `key` and `frequencies` that they were computed for."""

    key: tuple[Any, ...]
    frequencies: torch.Tensor
    angles: tuple[torch.Tensor, ...]


class Angles:
    """Cosines and sines of positions, cached in blocks of positions unless they depend on the sequence length."""

    BLOCK = 64
    STATIC = ("default", "linear", "llama3", "yarn")

    def __init__(self, rotary: nn.Module) -> None:
        self.rotary = rotary
        self.tables: Tables | None = None  # one attribute, read once, since several threads may ask

    def __getstate__(self) -> dict[str, Any]:
        return {"rotary": self.rotary}  # tables of inference mode cannot be copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.tables = None

    def __call__(
        self, x: torch.Tensor, past: int, length: int, positions: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        """Cosines and sines of `positions` ``[B or 1, length]``; if None, of the `length` positions from `past` on."""
        if torch.compiler.is_compiling():  # nothing may depend on values, and a table would be a constant
            if positions is None:
                positions = torch.arange(past, past + length, device=x.device).unsqueeze(0)
        elif positions is None or positions.tolist() == [[*range(past, past + length)]] * len(positions):
            return self.of_run(x, past, length)
        return self.rotary(x, position_ids=positions)

    def of_run(self, x: torch.Tensor, start: int, length: int) -> tuple[torch.Tensor, ...]:
        """Cosines and sines ``[1, length, R]`` from position `start` on, in the dtype of `x`."""
        block, offset = divmod(start, self.BLOCK)
        rotary = self.rotary
        hooked = rotary._forward_hooks or rotary._forward_pre_hooks or "forward" in vars(rotary)
        if hooked or rotary.rope_type not in self.STATIC or offset + length > self.BLOCK:
            return rotary(x, position_ids=torch.arange(start, start + length, device=x.device).unsqueeze(0))
        frequencies = rotary._buffers["inv_freq"]
        key = (block, x.dtype, rotary.attention_scaling)
        tables = self.tables
        if tables is None or key != tables.key or frequencies is not tables.frequencies:
            first = block * self.BLOCK
            positions = torch.arange(first, first + self.BLOCK, device=x.device).unsqueeze(0)
            tables = Tables(key, frequencies, rotary(x, position_ids=positions))
            self.tables = tables
        return tuple(table[:, offset : offset + length] for table in tables.angles)
