"""Quantized checkpoints: one file a format, each between bytes on disk and `QuantizedWeight`."""

from .checkpoint import Checkpoint, open_checkpoint
from .files import load_low_precision_checkpoint
from .gptq import gptq_tensors, read_gptq

__all__ = ["Checkpoint", "gptq_tensors", "load_low_precision_checkpoint", "open_checkpoint", "read_gptq"]
