"""Quantized large language models: `optimize`, `save`, `load` and what they are made of.

Importing this registers the quantization method ``ipex_quant`` with transformers, so that `from_pretrained` loads what
`save` or `save_pretrained` wrote, and the attention of that name.
"""

from . import attention, functional, modules, quantization, utils
from .optimization import optimize
from .saved.directory import load, save
from .saved.hf_quantizer import register

__all__ = ["functional", "load", "modules", "optimize", "quantization", "save", "utils"]

attention.register()
register()
