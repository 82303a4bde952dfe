"""Fake kernels: the shapes and dtypes that ops return, for torch.compile and the meta device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves


def register_fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function the fake kernel of the op ``ipex_quant::name``.

    torch calls the fake kernel when any tensor is on the meta device. It raises RuntimeError when another tensor is
    not, since the result would silently have no values.
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
    """Raise RuntimeError unless `tensor` has as many dimensions as `expected` names, such as ``[B, L, K]``."""
    dims = expected.count(",") + 1
    torch._check(tensor.dim() == dims, lambda: f"{name}: expected {expected}, got {list(tensor.shape)}")
