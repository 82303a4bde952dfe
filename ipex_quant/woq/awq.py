"""AWQ: scale up the input channels that large activations meet, so that rounding the weight costs them less.

Source: Lin, Tang, Tang, Yang, Dang, Gan, Han, "AWQ: Activation-aware Weight Quantization for LLM Compression and
Acceleration", arXiv 2306.00978. A weight is multiplied by `scale` ``[K]`` along its input channels, and its input is
divided by it. ``scale = mean|x| ^ alpha``, with the alpha that changes the outputs least; then the values of every
group are cut to where the outputs change least.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..numerics.affine import dequantize, quantize
from ..numerics.reservoir import Reservoir
from ..numerics.scheme import PER_CHANNEL, WeightScheme

_LEAST_MAGNITUDE = 1e-4
"""Of a channel, relative to the largest one, so that no scale comes near 0."""


@dataclass(frozen=True)
class AwqOptions:
    """How AWQ searches.

    - `alpha_steps`: alphas 1/steps, 2/steps, ... 1 are tried, besides no scaling at all; 0 leaves scaling out.
    - `clip_steps`: values are cut to as many fractions of a group's largest, evenly down to `lowest_clip`; 0 leaves
      clipping out.
    - `tokens`: input vectors, drawn at random over the whole calibration, that outputs are compared on.

    Raises ValueError for a negative number of steps, a `lowest_clip` outside 0..1, and no tokens.
    """

    alpha_steps: int = 20
    clip_steps: int = 10
    lowest_clip: float = 0.5
    tokens: int = 1024

    def __post_init__(self) -> None:
        for name, least in (("alpha_steps", 0), ("clip_steps", 0), ("tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if not 0 < self.lowest_clip <= 1:
            raise ValueError(
                f"lowest_clip: expected a fraction of the range, above 0 and at most 1, got {self.lowest_clip}"
            )


class InputSample:
    """The mean magnitude of every input channel of a linear layer, and some of its input vectors.

    `count` vectors were seen; `vectors` are at most `capacity` of them, float32 ``[T, K]``, each as likely as another.
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

    def add(self, inputs: torch.Tensor) -> None:
        """Take in a batch of inputs ``[..., K]``; raises ValueError when K is another, or for NaN or Inf."""
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

    `error` is the sum of squares by which quantization changes the outputs, `plain_error` the same without a scale.
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
    """Find the scale with which quantizing the `weights` ``[N, K]`` of a share group changes their outputs least.

    `inputs` ``[T, K]`` is what outputs are compared on, `magnitude` ``[K]`` the mean of ``|x|``. Channels whose
    magnitude is 0 keep the scale 1. Raises as `numerics.affine.quantize` does.
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
    """`weight` ``[N, K]``, float32, with the values of each group cut to the fraction of the largest with which the
    outputs change least, given the groups before it.

    `inputs` ``[T, K]`` is what outputs are compared on. The paper looks at every group's part of the outputs alone; but
    parts add up, so that what one group changes another can make up for.
    """
    weight = weight.detach().float()
    size = weight.shape[1] if scheme.group_size == PER_CHANNEL else scheme.group_size
    fractions = torch.linspace(1, options.lowest_clip, options.clip_steps + 1, dtype=torch.float32).tolist()
    rows = torch.arange(len(weight))
    total = torch.zeros(len(weight), len(inputs), dtype=torch.float32)  # by what groups so far change the outputs
    groups = []
    for group, samples in zip(weight.split(size, 1), inputs.split(size, 1), strict=True):
        largest = group.abs().amax(1, keepdim=True)
        cuts = torch.stack([group.clamp(-largest * fraction, largest * fraction) for fraction in fractions])
        changes = torch.stack([group - dequantize(quantize(cut, scheme)) for cut in cuts])
        errors = ((changes @ (samples.t() @ samples) + 2 * (total @ samples)) * changes).sum(-1)  # less that of `total`
        best = errors.argmin(0)
        groups.append(cuts[best, rows])
        total += changes[best, rows] @ samples.t()
    return torch.cat(groups, 1)
