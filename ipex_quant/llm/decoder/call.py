"""The carrier of the decode path: the arguments of a decoder layer, read once from transformers' keywords."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..cache.naming import CACHE_NAMES, given_cache
from .families import Family

_USED = ("attention_mask", "position_embeddings", "position_ids", *CACHE_NAMES, "layer_past")
_WITHOUT_EFFECT = ("use_cache", "output_hidden_states", "return_dict", "cache_position")


class LayerCall:
    """The arguments of a decoder layer besides the hidden states; each is None if it was not given.

    - `mask` is added to the scores, or is bool and true where a query sees a key; `encoder_mask` is the same for the
      tokens of an encoder.
    - `cache` holds the keys and values of self-attention, `caches` those of self- and cross-attention.
    - `position_embeddings` are cosines and sines ``[B or 1, L, R]``; `position_ids` are ``[B or 1, L]``.
    - `position_bias` is added to the scores of self-attention. The first layer computes it for all layers.
    - `encoder_states` are the hidden states of an encoder.
    """

    __slots__ = (
        "cache",
        "caches",
        "encoder_decoder_position_bias",
        "encoder_mask",
        "encoder_states",
        "mask",
        "position_bias",
        "position_embeddings",
        "position_ids",
    )

    attention_weights = None  # only stock layers return them

    def __init__(
        self,
        mask: torch.Tensor | None = None,
        caches: Any = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> None:
        self.mask = mask
        self.caches = caches
        self.cache = getattr(caches, "self_attention_cache", caches)
        self.position_embeddings = position_embeddings
        self.position_ids = position_ids
        self.position_bias = self.encoder_states = self.encoder_mask = self.encoder_decoder_position_bias = None


class CallReader:
    """Reads the keyword arguments of the layers of one family."""

    def __init__(self, family: Family) -> None:
        self.known = frozenset(_USED + _WITHOUT_EFFECT + family.keywords)
        self.inverts_mask = family.masked_is_true
        self.has_more = bool(family.keywords)

    def __call__(self, given: Mapping[str, Any]) -> LayerCall | None:
        """`given` as a `LayerCall`; None if an argument that is not supported has a value."""
        for name, value in given.items():
            if name not in self.known and value is not None and value is not False:
                return None
        get = given.get
        mask, caches = get("attention_mask"), given_cache(given)
        if mask is not None and self.inverts_mask:
            mask = ~mask
        if caches is None:
            caches = get("layer_past")
        call = LayerCall(mask, caches, get("position_embeddings"), get("position_ids"))
        if self.has_more:
            call.position_bias = get("position_bias")
            call.encoder_states = get("encoder_hidden_states")
            call.encoder_mask = get("encoder_attention_mask")
            call.encoder_decoder_position_bias = get("encoder_decoder_position_bias")
        return call
