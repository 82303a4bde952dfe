"""Quantized checkpoints: one module per format converts between tensors on disk and `QuantizedWeight`."""

from .awq import AwqFormat, read_awq
from .checkpoint import Checkpoint, WeightsInMemory, open_checkpoint, open_directory, open_gguf_checkpoint, split_name
from .file_tensors import FileTensor, Joined, Stored
from .files import find_quantization_config, load_low_precision_checkpoint, open_tensors
from .format import Int8Input
from .gguf_file import GgufFile, GgufTensor, find_gguf, open_gguf
from .gptq import gptq_tensors, read_gptq
from .registry import checkpoint_methods
from .sharding import shard_low_precision_checkpoint

__all__ = [
    "AwqFormat",
    "Checkpoint",
    "FileTensor",
    "GgufFile",
    "GgufTensor",
    "Int8Input",
    "Joined",
    "Stored",
    "WeightsInMemory",
    "checkpoint_methods",
    "find_gguf",
    "find_quantization_config",
    "gptq_tensors",
    "load_low_precision_checkpoint",
    "open_checkpoint",
    "open_directory",
    "open_gguf",
    "open_gguf_checkpoint",
    "open_tensors",
    "read_awq",
    "read_gptq",
    "shard_low_precision_checkpoint",
    "split_name",
]
