"""The `forward` of a BERT model on the tokens of a batch that are computed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.models.bert.modeling_bert import BertEmbeddings, BertModel
from transformers.utils.output_capturing import capture_outputs

from ..llm.decoder.watched_forward import has_hooks
from ..nn.fused_forward import FusedForward
from ..numerics.scheme import FLOAT_DTYPES
from .dropout import FastDropout
from .layer import FastLayer, norm_of_sum, uncalled_modules
from .tokens import Tokens, read_tokens


def fuse_bert(bert: BertModel, unpad: bool, seed: int | None) -> None:
    """Let `bert`, an encoder, compute as `FastBert` says; `restore_forwards` undoes it."""
    for layer in bert.encoder.layer:
        layer.forward = FastLayer(layer)
    for module in (bert.embeddings, *bert.encoder.layer):
        for dropout in module.modules():
            if type(dropout) is nn.Dropout and not dropout.inplace:
                dropout.forward = FastDropout(dropout)
    bert.forward = FastBert(bert, unpad, seed)


class FastBert(FusedForward):
    """Replaces the `forward` of a ``BertModel``, with the same arguments and results.

    With `unpad`, tokens that an ``attention_mask [B, L]`` hides are not computed; all their hidden states are 0. With a
    `seed`, dropout draws from a generator of its own. Autocast changes nothing.

    It calls the stock `forward` if attention weights or causal attention are asked for, if a cache or states of an
    encoder are given, and while there are hooks on a module that is not called as one.
    """

    def __init__(self, model: BertModel, unpad: bool, seed: int | None) -> None:
        self.model = model
        self.unpad = unpad
        self.dropout_state = None if seed is None else torch.Generator().manual_seed(seed).get_state()

    def __call__(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        cache: Any = None,
        use_cache: bool | None = None,
        past_key_values: Any = None,
        **options: Any,
    ) -> Any:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected either input_ids or inputs_embeds")
        inputs = Inputs(input_ids, token_type_ids, position_ids, inputs_embeds)
        others = (encoder_hidden_states, encoder_attention_mask, past_key_values if cache is None else cache)
        with self._own_dropout():
            if any(each is not None for each in others) or self._needs_stock(inputs, options):
                forward = type(self.model).forward
                return forward(
                    self.model, input_ids, attention_mask, *inputs[1:], *others, use_cache=use_cache, **options
                )
            tokens = read_tokens(inputs.shape, attention_mask, self.unpad)
            return self._forward(inputs, tokens, options)

    def _forward(self, inputs: Inputs, tokens: Tokens, options: dict[str, Any]) -> Any:
        return_dict = options.pop("return_dict", self.model.config.return_dict)
        with torch.autocast("cpu", enabled=False):
            outputs = _compute(self.model, inputs, tokens, **options, return_dict=True)
        if outputs.hidden_states is not None:
            outputs.hidden_states = tuple(
                tokens.pad(states) if states is not None and states.dim() == 2 else states
                for states in outputs.hidden_states
            )
        return outputs.to_tuple() if return_dict is False else outputs

    def _needs_stock(self, inputs: Inputs, options: Mapping[str, Any]) -> bool:
        model, config = self.model, self.model.config
        if options.get("output_attentions", config.output_attentions):
            warnings.warn("output_attentions: fast_bert has none; this call runs transformers' own code", stacklevel=5)
            return True
        if options.get("is_causal", getattr(config, "is_causal", None)):
            return True
        weight = model.embeddings.LayerNorm.weight
        if weight.device.type != "cpu" or weight.dtype not in FLOAT_DTYPES:
            return True
        return any(map(has_hooks, uncalled_modules(model)))

    @contextmanager
    def _own_dropout(self) -> Iterator[None]:
        """A context in which torch's default generator goes on where it was left in the last one."""
        if self.dropout_state is None or not self.model.training:
            yield
            return
        outer = torch.get_rng_state()
        torch.set_rng_state(self.dropout_state)
        try:
            yield
        finally:
            self.dropout_state = torch.get_rng_state()
            torch.set_rng_state(outer)


class Inputs(NamedTuple):
    """What the embeddings of a batch ``[B, L]`` are made of."""

    ids: torch.Tensor | None
    token_types: torch.Tensor | None
    positions: torch.Tensor | None
    embeds: torch.Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        """``(B, L)``; ValueError for another number of dimensions."""
        name, dims, tensor = ("input_ids", 2, self.ids) if self.embeds is None else ("inputs_embeds", 3, self.embeds)
        if tensor.dim() != dims:
            raise ValueError(f"{name}: expected [B, L{', K' * (dims == 3)}], got {list(tensor.shape)}")
        return tensor.shape[0], tensor.shape[1]


@capture_outputs
def _compute(
    model: BertModel, inputs: Inputs, tokens: Tokens, **options: Any
) -> BaseModelOutputWithPoolingAndCrossAttentions:
    """The outputs of `model`, in which captured hidden states, apart from the last, are rows."""
    x = embed(model.embeddings, inputs, tokens)
    for layer in model.encoder.layer:
        x = layer(x, tokens)
    x = tokens.pad(x)
    return BaseModelOutputWithPoolingAndCrossAttentions(
        last_hidden_state=x, pooler_output=None if model.pooler is None else model.pooler(x)
    )


def embed(module: BertEmbeddings, inputs: Inputs, tokens: Tokens) -> torch.Tensor:
    """What `module` computes of `inputs`, as rows ``[T, K]``."""
    if inputs.embeds is None:
        words = module.word_embeddings(tokens.pack(inputs.ids))
    else:
        words = tokens.pack(inputs.embeds).to(module.word_embeddings.weight.dtype)
    types = words.new_zeros(1, dtype=torch.long) if inputs.token_types is None else tokens.pack(inputs.token_types)
    positions = module.position_ids[:, : tokens.length] if inputs.positions is None else inputs.positions
    places = module.position_embeddings(tokens.pack(positions if positions.dim() == 2 else positions[None]))
    return module.dropout(norm_of_sum(module.LayerNorm, words + module.token_type_embeddings(types), places))
