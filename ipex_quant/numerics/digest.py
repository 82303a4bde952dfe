"""Digests of tensors, which tell whether a file belongs to a given model or data set."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch

_SAMPLES = 256


def tensor_digest(tensors_by_name: Iterable[tuple[str, Any]]) -> str:
    """Digest of names, shapes, dtypes and values of the CPU tensors in `tensors_by_name`; other values are ignored.

    Of each tensor it hashes a sample of the values and the sum of all, taken as integers. That takes no longer than a
    copy, and the sum does not depend on the number of threads.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors_by_name:
        if isinstance(tensor, torch.Tensor):
            flat = tensor.detach().contiguous().reshape(-1)
            some = flat[:: max(1, flat.numel() // _SAMPLES)].contiguous().view(torch.uint8)
            words = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(flat.element_size(), torch.int64))
            digest.update(f"{name} {list(tensor.shape)} {tensor.dtype} {words.sum(dtype=torch.int64)} ".encode())
            digest.update(some.numpy().tobytes())
    return digest.hexdigest()
