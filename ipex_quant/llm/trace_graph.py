"""`model.trace_graph`: TorchScript graphs that take and give IPEX's tuples, saved and generated with."""

from __future__ import annotations

import functools
import inspect
import logging
import warnings
from collections.abc import Callable
from os import PathLike
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..errors import ArgumentError, ArgumentTypeError
from ..nn.deferred import values_of
from ..nn.fused_forward import FusedForward
from .cache.naming import CACHE
from .cache.past import empty_tuple, layer_tuple
from .convention import accept_tuples, takes_tuples
from .generation import use_native_cache

logger = logging.getLogger("ipex_quant")

EXAMPLE_TOKENS = 32

_WITHOUT_EFFECT = ("use_cache", "return_dict", "logits_to_keep", "cache_position")


class TraceGraph:
    """What a model computes, called by IPEX's convention and saved as TorchScript: by a `graph`, or by the model.

    Without a graph `save` makes one: the model itself runs native kernels, which a graph makes no faster.
    """

    def __init__(self, model: PreTrainedModel, graph: Callable[..., Any] | None = None) -> None:
        self.model = model
        self.graph = graph

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The logits and the past, in a tuple or in a `ModelOutput`, as ``model.config.return_dict`` says."""
        if self.graph is None:
            return self.model(*args, **kwargs)
        result = self.graph(*args, **kwargs)
        return output_of(self.model, result[0], result[1])

    def save(self, path: str | PathLike) -> None:
        """Write the graph for `torch.jit.load`, which needs this package imported; RuntimeError if there can be none.

        It takes (input_ids, attention_mask, past_key_values, position_ids), the last if the model has it, of any batch
        and length.
        """
        graph = trace(self.model) if self.graph is None else self.graph
        if not isinstance(graph, torch.jit.ScriptModule):
            raise RuntimeError(f"trace_graph.save: only TorchScript can be saved, not a {type(graph).__name__}")
        graph.save(str(path))


def trace(model: PreTrainedModel) -> torch.jit.ScriptModule:
    """The frozen graph of a `model` that takes tuples; RuntimeError if it cannot be traced."""
    if not takes_tuples(model):
        raise RuntimeError(
            f"trace_graph.save: a {type(model).__name__} is not called with tuples of keys and values; "
            "ipex_quant.llm.save keeps it, quantized as it is"
        )
    example = example_inputs(model)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            return torch.jit.freeze(torch.jit.trace(model, example, strict=False, check_trace=False).eval())
        except Exception as error:  # tracing runs code of all sorts
            raise RuntimeError(
                f"trace_graph.save: torch.jit cannot trace this {type(model).__name__}: {error}; ipex_quant.llm.save "
                "keeps it, quantized as it is"
            ) from error


def example_inputs(model: PreTrainedModel) -> tuple[Any, ...]:
    """Arguments of a call by IPEX's convention: a prompt, and a past without tokens."""
    tokens = torch.ones(1, EXAMPLE_TOKENS, dtype=torch.long)
    inputs = tokens, torch.ones_like(tokens), empty_past(model)
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return inputs
    return *inputs, torch.arange(EXAMPLE_TOKENS).unsqueeze(0)


def empty_past(model: PreTrainedModel) -> tuple[tuple[torch.Tensor, ...], ...]:
    """IPEX's tuples of all layers of `model`, without tokens."""
    return tuple(empty_tuple() for _ in range(model.config.get_text_config(decoder=True).num_hidden_layers))


def output_of(model: PreTrainedModel, logits: torch.Tensor, past: Any) -> Any:
    """Logits and past as `model` returns them."""
    output = CausalLMOutputWithPast(logits=logits, **{CACHE: past})
    as_dict = model.config.return_dict and not getattr(model.config, "torchscript", False)
    return output if as_dict else output.to_tuple()


def _set_optimized_model_for_generation(
    model: PreTrainedModel,
    optimized_model: Callable[..., Any],
    first_token_optimized_model: Callable[..., Any] | None = None,
) -> PreTrainedModel:
    """Let `generate` and `forward` of `model` compute with `optimized_model`; return `model`.

    `optimized_model` is a traced or loaded graph of such a model, or anything else that is called by IPEX's convention;
    with `first_token_optimized_model` that one computes the calls without past. The weights of `model` are not used
    then and may be anything, on the meta device too. `model.trace_graph` and `model.trace_graph_first` are the two.

    Raises TypeError if `model` is no decoder-only transformers model or one of the others cannot be called.
    """
    if not takes_tuples(model):
        raise ArgumentTypeError(f"model: expected a decoder-only transformers model, got {type(model).__name__}")
    for graph in (optimized_model, first_token_optimized_model or optimized_model):
        if not callable(graph):
            raise ArgumentTypeError(f"optimized_model: expected a traced graph, got {type(graph).__name__}")
    accept_tuples(model)
    use_native_cache(model)
    model.forward = GraphForward(model, optimized_model, first_token_optimized_model)
    model.trace_graph = TraceGraph(model, optimized_model)
    if first_token_optimized_model is not None:
        model.trace_graph_first = TraceGraph(model, first_token_optimized_model)
    logger.info("ipex.llm.optimize has set the optimized or quantization model for model.generate()")
    return model


class GraphForward(FusedForward):
    """Replaces the `forward` of a decoder by calls of a graph over IPEX's tuples."""

    def __init__(
        self, model: PreTrainedModel, graph: Callable[..., Any], first_graph: Callable[..., Any] | None
    ) -> None:
        self.model = model
        self.graph = graph
        self.first_graph = graph if first_graph is None else first_graph

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(functools.partial(type(self.model).forward, self.model))

    def __call__(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: DynamicCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        **others: Any,
    ) -> Any:
        """Logits ``[B, L, vocabulary]`` and the cache; ValueError for an argument that the graph does not take."""
        tokens = inputs_embeds if input_ids is None else input_ids
        given = [name for name, value in others.items() if value is not None and value is not False]
        unknown = [name for name in given if name not in _WITHOUT_EFFECT]
        cache = past_key_values if cache is None else cache
        if tokens is None or unknown or not isinstance(cache, (DynamicCache, type(None))):
            found = type(cache).__name__
            raise ArgumentError(
                "a model with a trace_graph takes input_ids, attention_mask, position_ids and a cache (tuples "
                f"or a DynamicCache, got {found})" + (f", not {', '.join(unknown)}" if unknown else "")
            )
        layers = [] if cache is None else cache.layers
        stored = cache.get_seq_length() if layers else 0
        batch, length = tokens.shape[:2]
        if attention_mask is None:
            attention_mask = torch.ones(batch, stored + length, dtype=torch.long)
        if position_ids is None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        graph = self.graph if stored else self.first_graph
        tensors = [tokens, attention_mask, position_ids]
        result = graph(*_arranged(graph, tensors, self._tuples(layers, stored)))
        if cache is not None:
            cache.layers = [_filled(keys, values) for _, keys, values, _ in result[1]]
        logits = _last(result[0], others.get("logits_to_keep"))
        output = CausalLMOutputWithPast(logits=logits, **{CACHE: cache})
        return output if others.get("return_dict", self.model.config.return_dict) else output.to_tuple()

    def _tuples(self, layers: list[CacheLayerMixin], stored: int) -> tuple[tuple[torch.Tensor, ...], ...]:
        if not stored:
            return empty_past(self.model)
        beam_idx = torch.zeros(1, 4, dtype=torch.long)
        return tuple(tuple(map(values_of, layer_tuple(layer, beam_idx))) for layer in layers)


def _arranged(graph: Callable[..., Any], tensors: list[torch.Tensor], past: Any) -> list[Any]:
    """The arguments in the order of the `graph`; a graph that is no TorchScript gets IPEX's order."""
    if not isinstance(graph, torch.jit.ScriptModule):
        return [*tensors[:2], past, *tensors[2:]]
    # Names of a traced graph's arguments are those of `forward` by position, which IPEX's convention ignores.
    forward: Any = graph.forward
    kinds = [argument.type.kind() for argument in forward.schema.arguments[1:]]
    remaining = iter(tensors)
    return [past if kind == "TupleType" else next(remaining) for kind in kinds]


def _filled(keys: torch.Tensor, values: torch.Tensor) -> DynamicLayer:
    layer = DynamicLayer()
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    return layer


def _last(logits: torch.Tensor, count: int | torch.Tensor | None) -> torch.Tensor:
    """The logits of the last `count` tokens, or of those that a tensor says; all without."""
    if isinstance(count, torch.Tensor):
        return logits[:, count]
    return logits[:, -count:] if count else logits
