"""Models in GGUF files: their configuration and tokenizer out of the file's metadata."""

from .configuration import gguf_config
from .provisional import correct_config, provisional_config
from .tokenizer import gguf_tokenizer

__all__ = ["correct_config", "gguf_config", "gguf_tokenizer", "provisional_config"]
