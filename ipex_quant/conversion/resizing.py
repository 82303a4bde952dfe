"""`watch_head`: warn when resizing the embeddings of a transformers model makes quantized layers float."""

from __future__ import annotations

import functools
import warnings
from typing import Any

from torch import nn

from ..nn import QuantizedEmbedding, QuantizedModule


def watch_head(model: nn.Module) -> None:
    """Let `resize_token_embeddings` of this transformers model warn of quantized layers that it makes float."""
    # a partial, which can be copied and pickled with the model
    model.resize_token_embeddings = functools.partial(_resize_token_embeddings, model)


def _resize_token_embeddings(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """`resize_token_embeddings` of the model's class, after dequantizing a quantized embedding."""
    before = [model.get_input_embeddings(), model.get_output_embeddings()]
    quantized = isinstance(before[0], QuantizedEmbedding)
    if quantized:
        model.set_input_embeddings(before[0].dequantize())
    own: Any = type(model)
    embeddings = own.resize_token_embeddings(model, *args, **kwargs)
    if quantized and embeddings.num_embeddings == before[0].num_embeddings:
        model.set_input_embeddings(before[0])
        embeddings = before[0]
    after = [model.get_input_embeddings(), model.get_output_embeddings()]
    for old, new in zip(before, after, strict=True):
        if isinstance(old, QuantizedModule) and not isinstance(new, QuantizedModule):
            name = next((name for name, module in model.named_modules() if module is new), "the output layer")
            warnings.warn(
                f"resize_token_embeddings: {name} was quantized and is a float layer now; "
                "ipex_quant.llm.optimize(model, quantization_config=...) quantizes it again",
                stacklevel=2,
            )
    return embeddings
