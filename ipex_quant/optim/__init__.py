"""Training in a lower precision with exact float32 updates."""

from .halves import join_float32, split_float32
from .masters import FullMaster, Master, SplitMaster, attach_master, masters_of
from .prepared import PreparedOptimizer, plain_class, prepare_optimizer

__all__ = [
    "FullMaster",
    "Master",
    "PreparedOptimizer",
    "SplitMaster",
    "attach_master",
    "join_float32",
    "masters_of",
    "plain_class",
    "prepare_optimizer",
    "split_float32",
]
