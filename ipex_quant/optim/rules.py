"""How optimizers update parameters, in passes over chunks and with torch's fused kernels.

Settings are those of a parameter group; state has the names and values of the plain optimizer's.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from ..ops.halves import sgd_halves
from .chunks import Item, Pass, Piece, value_dtype
from .layout import Layout
from .masters import Master, SplitMaster

Settings = Mapping[str, Any]


class Rule(ABC):
    """The update of one class of optimizers."""

    def update(self, optimizer: Optimizer, group: Settings, masters: Iterable[Master], factor: float = 1.0) -> None:
        """Update the parameters of `masters`, all of which `can_update`, with their gradients times `factor`."""
        kinds: dict[Any, list[Item]] = {}
        with torch.no_grad():
            for master in masters:
                item = self._item(optimizer, group, master)
                kinds.setdefault(item.kind, []).append(item)
            for items in kinds.values():
                self._update(items, group, factor)

    @abstractmethod
    def _item(self, optimizer: Optimizer, group: Settings, master: Master) -> Item:
        """The parameter and its state, which is made if there is none, with this step counted."""

    @abstractmethod
    def _update(self, items: Sequence[Item], group: Settings, factor: float) -> None:
        """Update `items` of one kind."""


class SGDRule(Rule):
    """`torch.optim.SGD`."""

    def _item(self, optimizer: Optimizer, group: Settings, master: Master) -> Item:
        if group["momentum"] == 0:
            return Item(master, {})
        state = optimizer.state[master.param]
        first = state.get("momentum_buffer") is None
        if first:
            state["momentum_buffer"] = torch.empty_like(master.param, dtype=value_dtype(master.param))
        return Item(master, state, first)

    def _update(self, items: Sequence[Item], group: Settings, factor: float) -> None:
        if all(isinstance(item.master, SplitMaster) and item.has_bfloat16_gradient for item in items):
            split_sgd(items, group, factor)
            return
        for pieces, values in (chunks := Pass(items, factor)):
            fused_sgd(values, chunks.gradients(pieces), pieces, group, first=items[0].first)


class AdamRule(Rule):
    """`torch.optim.Adam` and `torch.optim.AdamW`."""

    def _item(self, optimizer: Optimizer, group: Settings, master: Master) -> Item:
        names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if group["amsgrad"] else 2]
        return Item(master, counted_state(optimizer, master.param, names))

    def _update(self, items: Sequence[Item], group: Settings, factor: float) -> None:
        for pieces, values in (chunks := Pass(items, factor)):
            fused_adam(values, chunks.gradients(pieces), pieces, group)


class AdagradRule(Rule):
    """`torch.optim.Adagrad`."""

    def _item(self, optimizer: Optimizer, group: Settings, master: Master) -> Item:
        initial = optimizer.defaults["initial_accumulator_value"]
        return Item(master, counted_state(optimizer, master.param, ("sum",), initial))

    def _update(self, items: Sequence[Item], group: Settings, factor: float) -> None:
        for pieces, values in (chunks := Pass(items, factor)):
            torch._fused_adagrad_(
                values,
                chunks.gradients(pieces),
                column(pieces, "sum"),
                column(pieces, "step"),
                lr=float(group["lr"]),
                lr_decay=group["lr_decay"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=group["maximize"],
            )


class LambRule(Rule):
    """`Lamb`: Adam's step, scaled for each parameter by the norm of its values over that of the step."""

    def _item(self, optimizer: Optimizer, group: Settings, master: Master) -> Item:
        return Item(master, counted_state(optimizer, master.param, ("exp_avg", "exp_avg_sq")))

    def _update(self, items: Sequence[Item], group: Settings, factor: float) -> None:
        adam = {**group, "lr": 1.0, "weight_decay": 0.0}
        room = torch.empty(max(item.numel for item in items), dtype=value_dtype(items[0].master.param))
        for item in items:
            # Adam, at a learning rate of 1, moves from 0 to minus its step.
            steps = room[: item.numel]
            norms = [0.0, 0.0]
            start = 0
            for pieces, (value,) in (chunks := Pass([item], factor, store=False)):
                step = steps[start : start + value.numel()].zero_()
                start += value.numel()
                fused_adam([step], chunks.gradients(pieces), pieces, adam)
                step.add_(value, alpha=-group["weight_decay"])
                norms = [norm + float(x.dot(x)) for norm, x in zip(norms, (value, step), strict=True)]
            scale = math.sqrt(norms[0] / norms[1]) if all(norms) else 1.0
            start = 0
            for _, (value,) in Pass([item], factor):
                value.add_(steps[start : start + value.numel()], alpha=float(group["lr"]) * scale)
                start += value.numel()


class LarsRule(SGDRule):
    """`Lars`: SGD, whose learning rate each parameter scales by the norm of its values over that of its gradient."""

    def _update(self, items: Sequence[Item], group: Settings, factor: float) -> None:
        for item in items:
            settings = {**group, "dampening": 0.0, "nesterov": False, "maximize": False}
            if group["lars"]:
                settings["lr"] = float(group["lr"]) * trust(item, group, factor)
            super()._update([item], settings, factor)


def trust(item: Item, group: Settings, factor: float) -> float:
    """LARS's local learning rate of a parameter: 1 where its values or gradients are all 0."""
    squares = [0.0, 0.0]
    for pieces, (value,) in (chunks := Pass([item], factor, store=False)):
        (gradient,) = chunks.gradients(pieces)
        squares = [square + float(x.dot(x)) for square, x in zip(squares, (value, gradient), strict=True)]
    weight, gradient_norm = map(math.sqrt, squares)
    if not (weight and gradient_norm):
        return 1.0
    return float(group["eeta"] * weight / (gradient_norm + group["weight_decay"] * weight + group["epsilon"]))


def fused_sgd(
    values: list[torch.Tensor], grads: list[torch.Tensor], pieces: Sequence[Piece], group: Settings, first: bool
) -> None:
    """Update `values` in place; the `first` time, momentum buffers have no values yet."""
    torch._fused_sgd_(
        values,
        grads,
        column(pieces, "momentum_buffer") if group["momentum"] != 0 else [],
        weight_decay=group["weight_decay"],
        momentum=group["momentum"],
        lr=float(group["lr"]),
        dampening=group["dampening"],
        nesterov=group["nesterov"],
        maximize=group["maximize"],
        is_first_step=first,
    )


def split_sgd(items: Sequence[Item], group: Settings, factor: float) -> None:
    """Update the halves of `items`, whose gradients are bfloat16, in place, in one pass over memory."""
    pieces = [piece for item in items for piece in item.pieces(item.numel)]
    sgd_halves(
        [high for high, _ in (piece.parts for piece in pieces)],
        [low for _, low in (piece.parts for piece in pieces)],
        [piece.grad.contiguous() for piece in pieces],
        column(pieces, "momentum_buffer") if group["momentum"] != 0 else [],
        lr=float(group["lr"]),
        momentum=group["momentum"],
        dampening=group["dampening"],
        weight_decay=group["weight_decay"],
        factor=factor,
        nesterov=group["nesterov"],
        maximize=group["maximize"],
        first=items[0].first,
    )


def fused_adam(values: list[torch.Tensor], grads: list[torch.Tensor], pieces: Sequence[Piece], group: Settings) -> None:
    """Update `values` in place."""
    function = torch._fused_adamw_ if group.get("decoupled_weight_decay") else torch._fused_adam_
    amsgrad = group.get("amsgrad", False)
    beta1, beta2 = group["betas"]
    function(
        values,
        grads,
        column(pieces, "exp_avg"),
        column(pieces, "exp_avg_sq"),
        column(pieces, "max_exp_avg_sq") if amsgrad else [],
        column(pieces, "step"),
        amsgrad=amsgrad,
        lr=float(group["lr"]),
        beta1=float(beta1),
        beta2=float(beta2),
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group.get("maximize", False),
    )


def column(pieces: Sequence[Piece], name: str) -> list[torch.Tensor]:
    """The state `name` of all pieces."""
    return [piece.state[name] for piece in pieces]


def counted_state(
    optimizer: Optimizer, param: torch.Tensor, names: Iterable[str], initial: float = 0.0
) -> dict[str, torch.Tensor]:
    """The state of `param` with one more step; made, with arrays of `names` that are `initial`, if there is none."""
    state: dict[str, torch.Tensor] = optimizer.state[param]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32)
        state.update((name, torch.full_like(param, initial, dtype=value_dtype(param))) for name in names)
    state["step"] += 1
    return state


def can_update(param: torch.Tensor) -> bool:
    """Whether a `Rule` updates `param`: it has a dense gradient, and lies in the memory of a CPU without gaps."""
    grad = param.grad
    return (
        grad is not None
        and grad.layout == torch.strided
        and param.device.type == "cpu"
        and param.is_floating_point()
        and Layout(param).dense
    )
