"""Helpers under IPEX's names."""

from ..checkpoints import load_low_precision_checkpoint, shard_low_precision_checkpoint

__all__ = ["load_low_precision_checkpoint", "shard_low_precision_checkpoint"]
