"""Quantized large language models: `optimize`, `save`, `load`, `export`, and the modules and functions of ``ipex.llm``.

Importing this package registers a quantization method and an attention implementation named ``ipex_quant`` with
transformers, so that `from_pretrained` loads models that `save` or `save_pretrained` wrote.
"""

from . import attention, functional, generation, modules, quantization, utils
from .exporting import export
from .loading import from_pretrained, load, load_tokenizer
from .optimization import optimize
from .saved import streaming
from .saved.hf_quantizer import register
from .saving import save
from .transformers_methods import register_with_transformers, unregister_from_transformers

__all__ = [
    "export",
    "from_pretrained",
    "functional",
    "generation",
    "load",
    "load_tokenizer",
    "modules",
    "optimize",
    "quantization",
    "register_with_transformers",
    "save",
    "unregister_from_transformers",
    "utils",
]

attention.register()
register()
streaming.register()
