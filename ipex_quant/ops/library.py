"""The native library: importing this module registers its ops with torch."""

from __future__ import annotations

import torch

try:
    from .. import _C  # noqa: F401  (importing it registers torch.ops.ipex_quant)
except ImportError as error:
    raise ImportError(f"ipex_quant's native library: {error}; run `make build` or `pip install .`") from error

native = torch.ops.ipex_quant
