"""`OnDevice`: where tensors are made, and in which dtype."""

from __future__ import annotations

from contextlib import ExitStack

import torch


class OnDevice:
    """Context manager: tensors, and with them modules, are made on `device`, floating-point ones in `dtype`.

    This is ``torch.device(device)`` with `dtype` as torch's default; what code asks for by name stays. On "meta" there
    are shapes without memory, for a model whose weights come later. With `enabled` False nothing changes.

    Raises TypeError if `dtype` is none that torch takes as its default, RuntimeError for an unknown `device`.
    """

    def __init__(self, dtype: torch.dtype, device: str | torch.device = "meta", enabled: bool = True) -> None:
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype: expected a floating-point dtype such as torch.bfloat16, got {dtype}")
        self.dtype = dtype
        self.device = torch.device(device)
        self.enabled = enabled
        self._entered: list[ExitStack] = []

    def __enter__(self) -> OnDevice:
        with ExitStack() as stack:
            if self.enabled:
                stack.callback(torch.set_default_dtype, torch.get_default_dtype())
                torch.set_default_dtype(self.dtype)
                stack.enter_context(self.device)
            self._entered.append(stack.pop_all())
        return self

    def __exit__(self, *exception: object) -> None:
        self._entered.pop().close()
