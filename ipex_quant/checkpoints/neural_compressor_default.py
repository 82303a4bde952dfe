"""What neural-compressor writes in its layout "default": ``quantized_weight.pt``, and ``qconfig.json`` beside it.

The tensors are GPTQ's, version 1. ``qconfig.json`` maps ``('model.layers.0.mlp.up_proj', 'Linear')`` to the settings of
one algorithm. Source: neural-compressor's ``save.py`` and ``WeightOnlyLinear``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..reading import shown
from .gptq import GptqFormat

_KEY = re.compile(r"^\('(?P<name>[^']+)', '\w+'\)$")


def default_format(config: Mapping[str, Any]) -> GptqFormat:
    """The format that a ``qconfig.json`` describes; ValueError for one that is none, and other types than integers."""
    modules = {}
    for key, settings in config.items():
        found = _KEY.match(key)
        if found is None:
            continue
        if not isinstance(settings, Mapping) or len(settings) != 1:
            raise ValueError(f"{shown(key)}: expected the settings of one algorithm, got {shown(settings)}")
        own = next(iter(settings.values()))
        if not isinstance(own, Mapping):
            raise ValueError(f"{shown(key)}: expected settings, got {shown(own)}")
        kind = own.get("dtype", "int")
        if not isinstance(kind, str) or not kind.startswith(("int", "fp32", "nf4")) or own.get("group_dim", 1) != 1:
            raise ValueError(
                f"{shown(key)}: expected dtype 'int' or 'nf4' and group_dim 1, got {shown(kind)}, "
                f"{shown(own.get('group_dim'))}"
            )
        if not kind.startswith("fp32"):
            names = ("bits", "group_size")
            modules[f"{re.escape(found['name'])}$"] = {name: own[name] for name in names if own.get(name) is not None}
    if not modules:
        raise ValueError(f"qconfig.json: expected settings of modules, got the entries {shown(sorted(config))}")
    return GptqFormat(dynamic=modules)
