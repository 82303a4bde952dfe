"""A model and its optimizer, prepared for training in bfloat16 or float16 and for fused updates."""

from __future__ import annotations

import copy
import warnings

import torch
from torch import nn
from torch.optim import Optimizer

from ..optim import RULES, FullMaster, Master, SplitMaster, attach_master, masters_of, plain_class, prepare_optimizer
from .casting import CAST_FOR_TRAINING, castable_parameters


def check_optimizer(optimizer: Optimizer | None) -> None:
    """Raise TypeError for what is neither an optimizer nor None."""
    if not isinstance(optimizer, Optimizer | None):
        raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")


def copy_together(model: nn.Module, optimizer: Optimizer | None) -> tuple[nn.Module, Optimizer | None]:
    """Copies of both that belong together, with all that the optimizer is made of.

    Torch's own copies of optimizers lack what a class has beside groups and state, without which LBFGS cannot step.
    """
    memo: dict[int, object] = {}
    model, copied = copy.deepcopy((model, optimizer), memo)
    if optimizer is not None:
        own = vars(optimizer).keys() - vars(copied).keys() - {"step"}  # which a scheduler bound to the original
        vars(copied).update({name: copy.deepcopy(vars(optimizer)[name], memo) for name in own})
    return model, copied


def prepare_training(
    model: nn.Module,
    optimizer: Optimizer,
    dtype: torch.dtype | None = None,
    split_master_weight: bool = True,
    fuse_update_step: bool = True,
    *,
    stacklevel: int = 2,
) -> tuple[nn.Module, Optimizer]:
    """Make `model` train in `dtype` with `optimizer`; return both, changed in place, so copy them together before.

    `dtype` is bfloat16 or float16 for modules of `CAST_FOR_TRAINING`, else their parameters stay. Cast parameters have
    float32 masters, which the model's state dict holds and the optimizer updates: with `split_master_weight`, and
    bfloat16, the lower 16 bits beside each parameter, else a copy. `fuse_update_step` updates in one pass over memory,
    by torch's fused kernels. An optimizer for which one of these does not exist works without, and a UserWarning, at
    `stacklevel` as in ``warnings.warn``, names it.
    """
    split = split_master_weight and dtype == torch.bfloat16
    if split and plain_class(optimizer) not in RULES:
        warnings.warn(
            f"{plain_class(optimizer).__name__} cannot update split master weights: float32 copies are kept instead",
            stacklevel=stacklevel,
        )
        split = False
    if dtype in (torch.bfloat16, torch.float16):
        cast_parameters(model, dtype, split)
    masters: dict[torch.Tensor, Master] = {m.param: m for part in model.modules() for m in masters_of(part).values()}
    if masters:
        prepare_optimizer(optimizer, masters)
    if fuse_update_step:
        if reason := why_not_fused(model, optimizer):
            message = f"fuse_update_step: there is no fused update for {reason}; the step stays as it is"
            warnings.warn(message, stacklevel=stacklevel)
        else:
            fuse_updates(optimizer)
    return model, optimizer


def why_not_fused(model: nn.Module, optimizer: Optimizer) -> str | None:
    """What `optimizer` has no fused update for: its class, or sparse gradients of `model`; None if it has one."""
    if plain_class(optimizer) not in RULES:
        return plain_class(optimizer).__name__
    return "sparse gradients" if any(getattr(module, "sparse", False) for module in model.modules()) else None


def fuse_updates(optimizer: Optimizer) -> None:
    """Let `optimizer` use the fused update in its groups and later ones.

    Groups that say how to update, by ``foreach``, ``fused`` or ``differentiable``, stay as they are.
    """
    for group in (optimizer.defaults, *optimizer.param_groups):
        if not (group.get("foreach") or group.get("differentiable") or group.get("fused") is not None):
            group["fused"] = True


def cast_parameters(model: nn.Module, dtype: torch.dtype, split: bool) -> None:
    """Cast the float32 parameters that can be to `dtype`, and attach masters, to their modules."""
    new: dict[nn.Parameter, Master] = {}
    for module, name, param in list(castable_parameters(model, CAST_FOR_TRAINING)):
        if param.dtype == torch.float32 and param not in new:
            new[param] = SplitMaster(param) if split else FullMaster(param, dtype)
        if param in new:
            attach_master(module, name, new[param])
