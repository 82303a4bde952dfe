"""Fake kernels: what an op returns, for torch.compile and for tensors without data, on the meta device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves


def register_fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function the fake kernel of the op ``ipex_quant::name``.

    torch calls it as soon as one tensor is on the meta device: where another one is not, the op raises RuntimeError, as
    nobody would compute what it returned.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            devices = {str(leaf.device) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
            torch._check(
                len(devices) <= 1, lambda: f"{name}: expected all tensors on one device, got {sorted(devices)}"
            )
            return function(*args, **kwargs)

        torch.library.register_fake(f"ipex_quant::{name}", checked)
        return checked

    return register


def check_shape(name: str, tensor: torch.Tensor, expected: str) -> None:
    """RuntimeError unless `tensor` has as many dimensions as `expected` names, as in ``[B, L, K]``."""
    dims = expected.count(",") + 1
    torch._check(tensor.dim() == dims, lambda: f"{name}: expected {expected}, got {list(tensor.shape)}")
