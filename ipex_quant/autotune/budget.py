"""`Budget`: what a model with quantized weights may cost, in bytes, in divergence and in time."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


@dataclass(frozen=True)
class Budget:
    """Limits of a search for weight-only schemes, all of which hold; None is no limit.

    - `max_bytes_per_weight`: bytes that a decode step reads of a weight, the average over linear layers.
    - `size`: bytes of all that the model stores: linear layers, output layer, embeddings, scales and what is in float.
    - `max_kl`: divergence from the float model in nats per token.
    - `tokens_per_second`: least speed of decoding, measured on this machine.

    Raises TypeError for what is no number, ValueError for one that is not finite or not above 0.
    """

    max_bytes_per_weight: float | None = None
    size: int | None = None
    max_kl: float | None = None
    tokens_per_second: float | None = None

    def __post_init__(self) -> None:
        for name in (each.name for each in fields(self)):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name}: expected a number above 0, got {value!r}")
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: expected a number above 0, got {value!r}")

    @property
    def any(self) -> bool:
        """Whether there is a limit."""
        return self != Budget()

    @property
    def without_accuracy(self) -> bool:
        """Whether the most accurate model within the limits is wanted, however accurate that is."""
        return self.max_kl is None and (self.size is not None or self.tokens_per_second is not None)


def parse_size(value: int | str) -> int:
    """Bytes of a size as users say it: "120MB", "1.5 GiB" or a number of bytes; ValueError for anything else."""
    text = str(value).strip()
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    if match is None or match[2].upper() not in _UNITS or len(text) > 32:
        raise ValueError(f"size: expected a number of bytes, or one as 120MB or 1.5GiB, got {text[:40]!r}")
    size = int(float(match[1]) * _UNITS[match[2].upper()])
    if size < 1:
        raise ValueError(f"size: expected at least one byte, got {text!r}")
    return size
