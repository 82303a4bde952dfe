"""LAMB and LARS: optimizers for large batches, with a learning rate of its own for each parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from .masters import OwnMaster
from .rules import LambRule, LarsRule, Rule, can_update

NORMS = (nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class LayerwiseOptimizer(Optimizer):
    """An optimizer whose `step` is a `Rule`."""

    rule: ClassVar[Rule]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have gradients; returns the loss that `closure`, if given, computes first.

        Raises RuntimeError for sparse gradients, and for a parameter that is not dense in a CPU's memory.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not can_update(p):
                    raise RuntimeError(
                        f"{type(self).__name__}: expected dense parameters and gradients on a CPU, got a "
                        f"{p.dtype} parameter of strides {p.stride()} on {p.device}, gradient {p.grad.layout}"
                    )
            self.rule.update(self, group, [OwnMaster(p) for p in params])
        return loss


class Lamb(LayerwiseOptimizer):
    """LAMB, in one pass over memory for Adam's step and one to apply it (You et al., 2019, arXiv 1904.00962).

    The arguments and state are Adam's; `weight_decay` is decoupled, and added to the step before it is scaled by the
    norm of the parameter over its own. Here no function bounds the former norm, and `fused` has no effect: every step
    is fused. State is float32, or float64 for such parameters. Raises ValueError for settings out of range.
    """

    rule = LambRule()

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        fused: bool = False,
    ) -> None:
        _check_not_negative(lr=lr, eps=eps, weight_decay=weight_decay)
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas: expected two numbers from 0 to less than 1, got {betas}")
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, settings | {"fused": fused or None})  # False says no more than None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for each in self.state.values():  # IPEX counted in integers
            if "step" in each and not isinstance(each["step"], torch.Tensor):
                each["step"] = torch.tensor(float(each["step"]))


class Lars(LayerwiseOptimizer):
    """LARS: SGD with momentum and local learning rates (You, Gitman and Ginsburg, 2017, arXiv 1708.03888).

    A parameter w with gradient g learns at ``lr * eeta * |w| / (|g| + weight_decay * |w| + epsilon)``; at `lr` in
    groups with ``lars=False``, and where w or g is all 0. As in `torch.optim.SGD`, momentum does not include the
    learning rate. Raises ValueError for settings out of range.
    """

    rule = LarsRule()

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        momentum: float = 0,
        eeta: float = 1e-3,
        weight_decay: float = 0,
        epsilon: float = 0.0,
    ) -> None:
        _check_not_negative(lr=lr, momentum=momentum, weight_decay=weight_decay, epsilon=epsilon)
        if not 0.0 < eeta <= 1.0:
            raise ValueError(f"eeta: expected a number above 0, at most 1, got {eeta}")
        defaults = {"lr": lr, "momentum": momentum, "eeta": eeta, "weight_decay": weight_decay, "epsilon": epsilon}
        super().__init__(params, {**defaults, "lars": True})


def create_optimizer_lars(
    model: nn.Module, lr: float, momentum: float, weight_decay: float, bn_bias_separately: bool, epsilon: float
) -> Lars:
    """`Lars` for the parameters of `model`.

    With `bn_bias_separately`, those of LayerNorm and BatchNorm modules, which have no weight decay then, and biases are
    in groups with ``lars=False``.
    """
    settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "epsilon": epsilon}
    if not bn_bias_separately:
        return Lars(model.parameters(), **settings)
    norms = dict.fromkeys(p for m in model.modules() if isinstance(m, NORMS) for p in m.parameters(recurse=False))
    rest = {name: p for name, p in model.named_parameters() if p not in norms}
    biases = {name: p for name, p in rest.items() if "bias" in name.rpartition(".")[2]}
    return Lars(
        [
            {"params": [p for name, p in rest.items() if name not in biases]},
            {"params": list(norms), "weight_decay": 0, "lars": False},
            {"params": list(biases.values()), "lars": False},
        ],
        **settings,
    )


def _check_not_negative(**settings: float) -> None:
    for name, value in settings.items():
        if not value >= 0.0:
            raise ValueError(f"{name}: expected a number that is not negative, got {value}")
