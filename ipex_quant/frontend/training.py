"""A model and its optimizer, prepared for training; lower precision and fused updates are not here yet."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer


def prepare_training(
    model: nn.Module,
    optimizer: Optimizer,
    dtype: torch.dtype | None = None,
    split_master_weight: bool = True,
    fuse_update_step: bool = True,
) -> tuple[nn.Module, Optimizer]:
    """Return `model` and `optimizer` as they are; NotImplementedError for `dtype` bfloat16 and float16."""
    if dtype in (torch.bfloat16, torch.float16):
        raise NotImplementedError(f"training in {dtype} is not supported yet")
    return model, optimizer
