"""AWQ: scale up the weight's input channels with large activations, so that rounding changes the outputs less.

Source: Lin, Tang, Tang, Yang, Dang, Gan, Han, "AWQ: Activation-aware Weight Quantization for LLM Compression and
Acceleration", arXiv 2306.00978. The weight is multiplied by `scale` ``[K]`` along its input channels, and the input is
divided by `scale`. ``scale = mean|x| ^ alpha``, with the alpha that changes the outputs least. Then each group of the
weight is clipped at the bound that changes the outputs least.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..numerics.affine import dequantize, quantize
from ..numerics.reservoir import Reservoir
from ..numerics.scheme import PER_CHANNEL, WeightScheme
from .clip_search import clip_fractions
from .gptq import GptqOptions

_LEAST_MAGNITUDE = 1e-4
"""Least magnitude of a channel, relative to the largest one; it keeps scales away from 0."""


@dataclass(frozen=True)
class AwqOptions:
    """Options of the AWQ search.

    - `alpha_steps`: the search tries no scaling and the alphas 1/steps, 2/steps, ... 1; 0 turns scaling off.
    - `clip_steps`: the search tries no clipping and this many bounds, evenly spaced fractions of a group's largest
      magnitude down to `lowest_clip`; 0 turns clipping off.
    - `tokens`: number of input vectors, drawn at random from the whole calibration, for comparing outputs.
    - `gptq`: how GPTQ rounds the scaled weights; without it they are clipped and rounded to nearest.
    - `scale_dtype`: dtype that quantization scales are rounded to; `gptq` has its own.

    Raises ValueError for a negative number of steps, a `lowest_clip` outside 0..1, and no tokens.
    """

    alpha_steps: int = 20
    clip_steps: int = 10
    lowest_clip: float = 0.5
    tokens: int = 1024
    gptq: GptqOptions | None = None
    scale_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        for name, least in (("alpha_steps", 0), ("tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        clip_fractions(self.clip_steps, self.lowest_clip)


class InputSample:
    """The mean magnitude of every input channel of a linear layer, and some of its input vectors.

    `count` is the number of vectors seen; `vectors`, float32 ``[T, K]``, is a uniform sample of at most `capacity`.
    """

    def __init__(self, in_features: int, capacity: int) -> None:
        self.count = 0
        self._sum = torch.zeros(in_features, dtype=torch.float64)
        self._drawn = Reservoir(capacity)
        self._generator = torch.Generator().manual_seed(0)

    @property
    def vectors(self) -> torch.Tensor:
        """The sampled input vectors."""
        rows = self._drawn.rows
        return torch.empty(0, len(self._sum), dtype=torch.float32) if rows is None else rows

    @property
    def magnitude(self) -> torch.Tensor:
        """Mean of ``|x|`` over the vectors seen, float32 ``[K]``."""
        return (self._sum / max(self.count, 1)).float()

    @property
    def power(self) -> torch.Tensor:
        """Sum of ``|x|`` over the vectors seen, float64 ``[K]``."""
        return self._sum

    def add(self, inputs: torch.Tensor) -> None:
        """Take in a batch of inputs ``[..., K]``; raises ValueError for another K, NaN or Inf."""
        if inputs.dim() == 0 or inputs.shape[-1] != len(self._sum):
            raise ValueError(f"inputs: expected shape [..., {len(self._sum)}], got {list(inputs.shape)}")
        vectors = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        total = vectors.abs().sum(0, dtype=torch.float64)
        if not torch.isfinite(total).all():
            raise ValueError("inputs: expected finite values, got NaN or Inf; check the model and the calibration data")
        self._sum += total
        self.count += len(vectors)
        self._drawn.add(vectors, self._generator)


@dataclass(frozen=True)
class ScaleSearch:
    """The best `scale`, float32 ``[K]``, and its `alpha`, 0 for a scale of ones.

    `error` is the sum of squared output errors with that scale, `plain_error` without a scale.
    """

    scale: torch.Tensor
    alpha: float
    error: float
    plain_error: float


def search_scale(
    weights: Sequence[torch.Tensor],
    schemes: Sequence[WeightScheme],
    inputs: torch.Tensor,
    magnitude: torch.Tensor,
    alpha_steps: int = 20,
) -> ScaleSearch:
    """Find the scale of a share group for which quantizing its `weights` ``[N, K]`` changes their outputs least.

    The outputs are those for `inputs` ``[T, K]``. `magnitude` ``[K]`` is the mean of ``|x|``; channels of magnitude 0
    keep the scale 1. Raises as `numerics.affine.quantize` does.
    """
    matrices = [weight.detach().float() for weight in weights]

    def error(scale: torch.Tensor) -> float:
        changes = (
            weight - dequantize(quantize(weight * scale, scheme)).div_(scale)
            for weight, scheme in zip(matrices, schemes, strict=True)
        )
        return sum(float((inputs @ change.t()).square_().sum()) for change in changes)

    ones = torch.ones_like(magnitude)
    plain_error = error(ones)
    best = ScaleSearch(ones, 0.0, plain_error, plain_error)
    if not magnitude.any():
        return best
    for step in range(1, alpha_steps + 1):
        scale = scale_of(magnitude, step / alpha_steps)
        found = error(scale)
        if found < best.error:
            best = ScaleSearch(scale, step / alpha_steps, found, plain_error)
    return best


def scale_of(magnitude: torch.Tensor, alpha: float) -> torch.Tensor:
    """``magnitude ^ alpha``, float32 ``[K]``, with the geometric mean of the extremes at 1; 1 where magnitude is 0."""
    scale = magnitude.clamp(min=_LEAST_MAGNITUDE * float(magnitude.max())).pow(alpha)
    used = magnitude > 0
    scale /= (scale[used].min() * scale[used].max()).sqrt()
    return torch.where(used, scale, 1.0)


def clipped(weight: torch.Tensor, scheme: WeightScheme, inputs: torch.Tensor, options: AwqOptions) -> torch.Tensor:
    """Clip each group of `weight` ``[N, K]`` at the bound that changes the outputs least; the result is float32.

    The outputs are those for `inputs` ``[T, K]``. The paper compares each group's share of the outputs alone; here a
    group can also compensate for the output change that the groups before it cause.
    """
    weight = weight.detach().float()
    size = weight.shape[1] if scheme.group_size == PER_CHANNEL else scheme.group_size
    fractions = clip_fractions(options.clip_steps, options.lowest_clip).tolist()
    rows = torch.arange(len(weight))
    total = torch.zeros(len(weight), len(inputs), dtype=torch.float32)  # output change that earlier groups cause
    groups = []
    for group, samples in zip(weight.split(size, 1), inputs.split(size, 1), strict=True):
        largest = group.abs().amax(1, keepdim=True)
        cuts = torch.stack([group.clamp(-largest * fraction, largest * fraction) for fraction in fractions])
        changes = torch.stack([group - dequantize(quantize(cut, scheme)) for cut in cuts])
        errors = ((changes @ (samples.t() @ samples) + 2 * (total @ samples)) * changes).sum(-1)  # less `total`'s own
        best = errors.argmin(0)
        groups.append(cuts[best, rows])
        total += changes[best, rows] @ samples.t()
    return torch.cat(groups, 1)
