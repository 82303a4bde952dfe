"""Native attention for the transformers models in a model, for inference."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn


def use_native_attention(model: nn.Module) -> None:
    """Let the transformers models in `model`, or that it is, use the native attention where they can."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None:  # nothing in `model` can come from transformers, whose import takes seconds
        return
    from ..llm.attention import use_native_attention as use

    for module in model.modules():
        if isinstance(module, modeling.PreTrainedModel):
            use(module)
            module._ipex_quant_attention = Registration()


class Registration:
    """Registers the native attention with transformers wherever a copy of it is unpickled with a model that uses it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _registered, ()


def _registered() -> Registration:
    from ..llm.attention import register

    register()
    return Registration()
