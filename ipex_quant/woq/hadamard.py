"""`random_rotation`: orthogonal matrices that spread outliers over all features."""

from __future__ import annotations

import torch


def random_rotation(size: int, seed: int = 0) -> torch.Tensor:
    """A random orthogonal matrix, float64 ``[size, size]``.

    A Hadamard matrix of the largest power of two in `size`, times a random orthogonal matrix of what is left, with
    random signs: any one feature is spread evenly over all of a power of two. Raises ValueError for a size below 1.

    Source: Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", arXiv 2404.00456, which takes other
    Hadamard matrices where the size is no power of two.
    """
    if size < 1:
        raise ValueError(f"size: expected at least 1, got {size}")
    generator = torch.Generator().manual_seed(seed)
    power = size & -size
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < power:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    odd = size // power
    rest = torch.linalg.qr(torch.randn(odd, odd, generator=generator, dtype=torch.float64))[0]
    signs = torch.randint(0, 2, (size, 1), generator=generator) * 2 - 1
    return signs * torch.kron(matrix / power**0.5, rest.contiguous())
