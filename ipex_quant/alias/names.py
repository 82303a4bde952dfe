"""Where this package has what IPEX had: tables of paths below ``intel_extension_for_pytorch``."""

from __future__ import annotations

VERSION = "2.8.0+ipex_quant"
"""The version of IPEX whose API this is, for callers that compare versions."""

MODULES: dict[str, str] = {
    "": "ipex_quant",
    "_C": "ipex_quant.alias.capabilities",
    "llm.functional.fusions": "ipex_quant.llm.functional",
    "nn.modules.weight_only_quantization": "ipex_quant.nn",
    "nn.utils": "",
    "optim._lamb": "ipex_quant.optim",
    "optim._lars": "ipex_quant.optim",
    "quantization._qconfig": "ipex_quant.quantization",
    "quantization._quantize": "ipex_quant.quantization",
    "quantization._quantize_utils": "ipex_quant.quantization",
    "utils": "",
    "version": "ipex_quant.alias.version",
}
"""IPEX's modules that are elsewhere here, and our module that has their names; "" has none but those of `OBJECTS`.

Modules that have the same path below both packages are not listed.
"""

OBJECTS: dict[str, str] = {
    "__version__": "ipex_quant.alias.names:VERSION",
}
"""Names that are elsewhere here, or otherwise called: our module, a colon, our name."""

ELSEWHERE: dict[str, str] = {
    "amp": "use torch.autocast",
}
"""What IPEX had and this package has not: what to use instead."""
