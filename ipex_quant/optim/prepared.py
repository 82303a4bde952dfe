"""Optimizers of torch, or of anybody, that update float32 masters of parameters in a lower precision.

`prepare_optimizer` gives an optimizer a subclass of its own class, made here. That keeps `isinstance`, the name,
`param_groups`, hooks and schedulers, and, other than a method put on the instance, is still there after a copy or a
round trip through pickle, both of which drop all that an optimizer has beside its state and groups.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer

from .fusing import RULES
from .masters import Master
from .rules import Rule, can_update

Closure = Callable[[], Any]


class PreparedOptimizer(Optimizer):
    """What `prepare_optimizer` adds to the class of an optimizer.

    `param_groups` hold the model's parameters, in whatever precision they are, and the gradients are theirs. State is
    float32, of which `state_dict` is that of the plain optimizer over float32 parameters: it loads into one, and the
    other way round.
    """

    _plain: type[Optimizer]
    _masters: dict[torch.Tensor, Master]

    def _run(self, closure: Closure | None = None) -> Any:
        """The plain optimizer's step on the masters; in groups that say ``fused``, by the `Rule` of its class."""
        with self._scaled_gradients() as factor:
            if factor is None:
                return None
            rule = RULES.get(self._plain)
            if rule is None or not any(group.get("fused") for group in self.param_groups):
                return self._plain_step(closure, factor)
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            with self._without(self._update_masters(rule, factor)) as rest:
                if rest:
                    self._plain_step(None, factor)
            return loss

    step = Optimizer.profile_hook_step(_run)
    step.hooked = True  # type: ignore[attr-defined]  # how torch knows a step that calls the hooks

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of this optimizer or of the plain one, which had float32 parameters."""
        # torch casts state to the dtype of the parameters that it finds.
        with self._exchanged({p: torch.empty(0, device=p.device) for p in self._masters}):
            super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_masters": self._masters}

    def __reduce__(self) -> tuple[Any, ...]:
        return _blank, (self._plain,), self.__getstate__()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether `torch.amp.GradScaler` leaves unscaling to `step`: float16 gradients would lose bits by it."""
        return any(p.dtype == torch.float16 for p in self._masters)

    @contextmanager
    def _scaled_gradients(self) -> Iterator[float | None]:
        """What to multiply gradients with; None if a GradScaler found infinite ones, and the step is to be skipped."""
        given = {name: vars(self).pop(name) for name in ("grad_scale", "found_inf") if name in vars(self)}
        scale = given.get("grad_scale")
        try:
            yield None if given.get("found_inf") else 1.0 if scale is None else 1.0 / float(scale)
        finally:
            vars(self).update(given)  # the scaler deletes them

    def _update_masters(self, rule: Rule, factor: float) -> set[torch.Tensor]:
        """Update what `rule` can; returns the parameters."""
        done: set[torch.Tensor] = set()
        for group in self.param_groups:
            if group.get("fused"):
                masters = [self._masters[p] for p in group["params"] if p in self._masters and can_update(p)]
                rule.update(self, group, masters, factor)
                done.update(master.param for master in masters)
        return done

    @contextmanager
    def _without(self, params: set[torch.Tensor]) -> Iterator[bool]:
        """The optimizer without some of its parameters; whether there is a gradient left."""
        groups = [(group, group["params"]) for group in self.param_groups]
        try:
            for group, every in groups:
                group["params"] = [p for p in every if p not in params]
            yield any(p.grad is not None for group, _ in groups for p in group["params"])
        finally:
            for group, every in groups:
                group["params"] = every

    def _plain_step(self, closure: Closure | None, factor: float) -> Any:
        masters = {p: self._masters[p] for group in self.param_groups for p in group["params"] if p in self._masters}
        values = {p: master.value() for p, master in masters.items()}

        def read_gradients() -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    if p in values:
                        values[p].grad = p.grad if p.grad is None else p.grad.detach().to(torch.float32) * factor
                    elif factor != 1.0 and p.grad is not None:
                        p.grad.mul_(factor)

        def write_values() -> None:
            for p, master in masters.items():
                master.assign(values[p])

        def closure_on_parameters() -> Any:
            write_values()
            with self._exchanged({value: p for p, value in values.items()}):
                loss = closure()
                read_gradients()
            return loss

        read_gradients()
        with self._exchanged(values):
            loss = self._plain_update(closure and closure_on_parameters)
        write_values()
        for value in values.values():
            value.grad = None
        return loss

    def _plain_update(self, closure: Closure | None) -> Any:
        step = self._plain.step
        if getattr(step, "hooked", False):  # hooks are for the step as a whole
            step = step.__wrapped__  # type: ignore[attr-defined]
        return step(self, closure)

    @contextmanager
    def _exchanged(self, others: Mapping[torch.Tensor, torch.Tensor]) -> Iterator[None]:
        """The optimizer with other tensors for its parameters."""
        self._exchange(others)
        try:
            yield
        finally:
            self._exchange({other: p for p, other in others.items()})

    def _exchange(self, others: Mapping[torch.Tensor, torch.Tensor]) -> None:
        for group in self.param_groups:
            group["params"][:] = [others.get(p, p) for p in group["params"]]
        for p in [p for p in self.state if p in others]:
            self.state[others[p]] = self.state.pop(p)


def prepare_optimizer(optimizer: Optimizer, masters: Mapping[torch.Tensor, Master]) -> Optimizer:
    """Let `optimizer` update the `masters` of its parameters; returns it, changed in place.

    It may have been prepared before. A learning rate scheduler has to be made afterwards: one that exists wraps the
    old `step`.
    """
    if not isinstance(optimizer, PreparedOptimizer):
        vars(optimizer).pop("step", None)
        optimizer.__class__ = _prepared_class(type(optimizer))
    vars(optimizer)["_masters"] = dict(masters)
    return optimizer


def plain_class(optimizer: Optimizer) -> type[Optimizer]:
    """The class of `optimizer` before it was prepared."""
    return type(optimizer)._plain if isinstance(optimizer, PreparedOptimizer) else type(optimizer)


@functools.cache
def _prepared_class(plain: type[Optimizer]) -> type[PreparedOptimizer]:
    names = {
        "_plain": plain,
        "__module__": plain.__module__,
        "__doc__": plain.__doc__,
        "__qualname__": plain.__qualname__,
    }
    return type(plain.__name__, (PreparedOptimizer, plain), names)


def _blank(plain: type[Optimizer]) -> PreparedOptimizer:
    kind = _prepared_class(plain)
    return kind.__new__(kind)
