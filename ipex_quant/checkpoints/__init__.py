"""Quantized checkpoints: one module per format converts between tensors on disk and `QuantizedWeight`."""

from .awq import AwqFormat, read_awq
from .checkpoint import Checkpoint, WeightsInMemory, open_checkpoint
from .files import load_low_precision_checkpoint
from .gptq import gptq_config, gptq_tensors, read_gptq, write_gptq

__all__ = [
    "AwqFormat",
    "Checkpoint",
    "WeightsInMemory",
    "gptq_config",
    "gptq_tensors",
    "load_low_precision_checkpoint",
    "open_checkpoint",
    "read_awq",
    "read_gptq",
    "write_gptq",
]
