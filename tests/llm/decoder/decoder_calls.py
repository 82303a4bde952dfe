"""How often the native decoder is called, seen where torch dispatches its ops."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class DecoderCalls(TorchDispatchMode):
    """Collects in `layers` how many layers each native call has, while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[int] = []

    def __torch_dispatch__(
        self, function: torch._ops.OpOverload, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if function._schema.name == "ipex_quant::decoder_layers":
            names = [argument.name for argument in function._schema.arguments]
            arguments = dict(zip(names, args, strict=False)) | (kwargs or {})
            self.layers.append(len(arguments["starts"]))
        return function(*args, **(kwargs or {}))
