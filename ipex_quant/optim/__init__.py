"""Optimizers: LAMB and LARS, and training in a lower precision with exact float32 updates."""

from .fusing import RULES
from .layerwise import Lamb, Lars, create_optimizer_lars
from .masters import FullMaster, Master, SplitMaster, attach_master, masters_of
from .prepared import PreparedOptimizer, plain_class, prepare_optimizer

__all__ = [
    "RULES",
    "FullMaster",
    "Lamb",
    "Lars",
    "Master",
    "PreparedOptimizer",
    "SplitMaster",
    "attach_master",
    "create_optimizer_lars",
    "masters_of",
    "plain_class",
    "prepare_optimizer",
]
