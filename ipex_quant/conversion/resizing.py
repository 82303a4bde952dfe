"""A word of what resizing the embeddings of a transformers model does to its quantized output layer."""

from __future__ import annotations

import functools
import warnings
from typing import Any

from torch import nn

from ..nn import QuantizedModule


def watch_head(model: nn.Module) -> None:
    """Let `resize_token_embeddings` of this transformers model warn where it makes the output layer a float one."""
    # a partial, which can be copied and pickled with the model
    model.resize_token_embeddings = functools.partial(_resize_token_embeddings, model)


def _resize_token_embeddings(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """`resize_token_embeddings` of the model's class, with the warning."""
    head = model.get_output_embeddings()
    own: Any = type(model)
    embeddings = own.resize_token_embeddings(model, *args, **kwargs)
    resized = model.get_output_embeddings()
    if isinstance(head, QuantizedModule) and not isinstance(resized, QuantizedModule):
        name = next((name for name, module in model.named_modules() if module is resized), "the output layer")
        warnings.warn(
            f"resize_token_embeddings: {name} was quantized and is a float layer now; "
            "ipex_quant.llm.optimize(model, quantization_config=...) quantizes it again",
            stacklevel=2,
        )
    return embeddings
