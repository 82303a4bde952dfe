"""BERT models in few operations per layer, over their real tokens only, for inference and training."""

from .convert import fast_bert

__all__ = ["fast_bert"]
