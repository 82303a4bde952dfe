"""Writing quantized checkpoints: one module per format turns `QuantizedWeight`s into tensors and a configuration.

A format either holds codes, scales and zero points as they are, or refuses the layer: nothing is quantized again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from .awq import AwqWriter
from .compressed_tensors import CompressedTensorsWriter
from .gptq import GptqWriter
from .writer import CheckpointWriter, Layer, LayerError

WRITERS: Mapping[str, Callable[[Sequence[Layer], Sequence[str], str | None], CheckpointWriter]] = MappingProxyType(
    {
        "gptq": GptqWriter,
        "awq": AwqWriter,
        "compressed-tensors": CompressedTensorsWriter,
    }
)
"""Maps the name of a format to what makes its writer of quantized layers, names of float layers, and the head's name.
"""

__all__ = ["WRITERS", "CheckpointWriter", "GptqWriter", "Layer", "LayerError"]
