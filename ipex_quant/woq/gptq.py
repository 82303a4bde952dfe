"""GPTQ: quantize one input feature after another; later features compensate for the errors of earlier ones.

Source: Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", arXiv 2210.17323. `numerics.affine` defines the scales and zero points. With a diagonal Hessian no
feature can compensate for another, and the result is exactly round to nearest.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

import torch

from ..numerics.affine import code_offset, code_range, plain_codes, quantize
from ..numerics.codebooks import CODEBOOKS, code_levels, nearest_codes
from ..numerics.quantized_weight import QuantizedWeight, code_dtype
from ..numerics.scheme import PER_CHANNEL, WeightScheme
from .clip_search import check_grid, clip_fractions, search_scales
from .scale_refit import refit_scales

MAX_DAMPING = 10.0
"""Largest `percdamp` to accept, and to try on a Hessian that cannot be inverted."""


@dataclass(frozen=True)
class GptqOptions:
    """Options of GPTQ; the defaults are the most accurate on trained models.

    - `percdamp`: value added to the Hessian's diagonal, as a fraction of the diagonal's mean.
    - `act_order`: quantize the features with the largest inputs first. Groups follow that order, which needs a `g_idx`,
      unless `static_groups` is set.
    - `static_groups`: compute scales and zero points from the original weight, before any error compensation.
    - `clip_steps`: for every group, try the whole range and this many fractions of it, down to `lowest_clip`, and take
      the one whose rounding errors are least, weighted by what later features cannot compensate; 0 takes the range.
    - `refit`: once all codes are known, find the scales with which they come closest to the weight. None does it where
      it pays: up to 3 bits.
    - `correction`: share of the error from quantized layers before that this one corrects, where their float outputs
      are known; 0 quantizes each layer for itself.
    - `block_size`: number of features after which their errors are applied to all later blocks.
    - `scale_dtype`: dtype that scales are rounded to before they quantize the weight.

    Raises ValueError for a `percdamp` outside 0..10, a `block_size` below 1, negative `clip_steps`, and a `lowest_clip`
    or `correction` outside 0..1.
    """

    percdamp: float = 0.01
    act_order: bool = True
    static_groups: bool = True
    clip_steps: int = 10
    lowest_clip: float = 0.75
    refit: bool | None = None
    correction: float = 1.0
    block_size: int = 128
    scale_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if not 0 <= self.percdamp <= MAX_DAMPING:
            raise ValueError(f"percdamp: expected 0 to {MAX_DAMPING:g}, usually 0.01, got {self.percdamp}")
        if self.block_size < 1:
            raise ValueError(f"block_size: expected at least 1, got {self.block_size}")
        if not 0 <= self.correction <= 1:
            raise ValueError(f"correction: expected a number from 0 to 1, got {self.correction}")
        self.clip_fractions()

    def clip_fractions(self) -> torch.Tensor:
        """The fractions of a group's range that are tried."""
        return clip_fractions(self.clip_steps, self.lowest_clip)


class HessianAccumulator:
    """Running means over the input vectors x of one linear layer, float32 ``[K, K]``.

    `hessian` is that of ``x x^T``, `shift` that of ``(y - x) x^T`` with the input y of the layer in the float model.
    """

    def __init__(self, in_features: int) -> None:
        self.hessian = torch.zeros(in_features, in_features, dtype=torch.float32)
        self.shift = torch.zeros_like(self.hessian)
        self.count = 0

    @property
    def power(self) -> torch.Tensor:
        """Mean square of each input feature, float32 ``[K]``."""
        return self.hessian.diagonal()

    def add(self, inputs: torch.Tensor, float_inputs: torch.Tensor | None = None) -> None:
        """Take in a batch of inputs ``[..., K]``; ValueError for another K.

        `float_inputs` are the same in the float model; without them, or with another shape, they are taken as equal.
        """
        if inputs.dim() == 0 or inputs.shape[-1] != len(self.hessian):
            raise ValueError(f"inputs: expected shape [..., {len(self.hessian)}], got {list(inputs.shape)}")
        vectors = inputs.detach().reshape(-1, len(self.hessian)).float()
        total = self.count + len(vectors)
        if total:
            share = {"beta": self.count / total, "alpha": 1 / total}
            self.hessian.addmm_(vectors.t(), vectors, **share)
            if float_inputs is not None and float_inputs.shape == inputs.shape:
                self.shift.addmm_((float_inputs.detach().reshape(vectors.shape) - vectors).t(), vectors, **share)
            else:
                self.shift.mul_(share["beta"])
        self.count = total


def quantize_weight(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    scheme: WeightScheme,
    options: GptqOptions | None = None,
    shift: torch.Tensor | None = None,
) -> QuantizedWeight:
    """Quantize `weight` ``[N, K]`` so that ``x @ weight.T`` changes least for the inputs of `hessian`.

    `scheme` has integers or a table of values, as NF4. `hessian` is the mean of ``x x^T``, ``[K, K]``, up to a factor.
    With `shift`, the mean of ``(y - x) x^T`` up to the same factor, the quantized weight's outputs for x come closest
    to those of `weight` for y, the inputs in the float model. Features whose input is always zero are rounded to
    nearest. Raises TypeError for a weight that is no float, ValueError for other shapes or dtypes, NaN or Inf, and
    RuntimeError for a Hessian that cannot be inverted; warns when that takes more damping than asked for.

    Source of `shift`: Li, Yin, Lee, Xiao, Panda, "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric
    Calibration", arXiv 2504.02692. Here it moves the weight to the least-squares solution before it is rounded.
    """
    return quantize_compensated(weight, hessian, scheme, options, shift)[0]


def quantize_compensated(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    scheme: WeightScheme,
    options: GptqOptions | None = None,
    shift: torch.Tensor | None = None,
) -> tuple[QuantizedWeight, torch.Tensor]:
    """The result of `quantize_weight`, and what was rounded to it: the weight that compensates, float32 ``[N, K]``."""
    options = options or GptqOptions()
    check_grid(scheme.dtype)
    quantize(weight, scheme)  # checks the weight
    in_features = weight.shape[1]
    for name, matrix in (("hessian", hessian), ("shift", hessian if shift is None else shift)):
        if tuple(matrix.shape) != (in_features, in_features):
            raise ValueError(f"{name}: expected shape {[in_features, in_features]}, got {list(matrix.shape)}")
        if not torch.isfinite(matrix).all():
            raise ValueError(f"{name}: expected finite values, got NaN or Inf; check the calibration inputs")

    features = torch.arange(in_features)
    if options.act_order:
        features = hessian.diagonal().argsort(descending=True, stable=True)
    factor = _inverse_factor(hessian.float()[features][:, features], options.percdamp)
    weight = weight.detach().float()
    if shift is not None and options.correction:
        moved = (weight @ shift.float()[:, features]) @ factor.t() @ factor  # by the inverse of the Hessian
        weight = weight + options.correction * moved[:, features.argsort()]
    columns = weight.t()[features].contiguous()

    grid = _Grid(weight, scheme, factor.diagonal() ** -2, features, options)
    for start in range(0, in_features, options.block_size):
        stop = min(start + options.block_size, in_features)
        errors = torch.empty(stop - start, columns.shape[1], dtype=torch.float32)
        for i in range(start, stop):
            grid.enter(i, int(features[i]), columns)
            snapped = grid.snap(columns[i])
            error = (columns[i] - snapped) / factor[i, i]
            columns[i + 1 : stop].addr_(factor[i, i + 1 : stop], error, alpha=-1)
            errors[i - start] = error
        columns[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    quantized = grid.quantized_weight(features)
    if options.refit if options.refit is not None else scheme.dtype.bits <= 3:
        quantized = replace(quantized, scales=refit_scales(weight, hessian.float(), quantized, options.scale_dtype))
    return quantized, columns[features.argsort()].t()


class _Grid:
    """The codes of the features quantized so far, and the scale and zero point of the current feature's group.

    `importance` ``[K]``, in the order `features` of quantization, says how much of a feature's squared error remains
    after later features have compensated for it.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        scheme: WeightScheme,
        importance: torch.Tensor,
        features: torch.Tensor,
        options: GptqOptions,
    ) -> None:
        self.scheme, self.shape = scheme, (weight.shape[0], weight.shape[1])
        self.group_size = self.shape[1] if scheme.group_size == PER_CHANNEL else scheme.group_size
        self.importance, self.fractions, self.scale_dtype = importance, options.clip_fractions(), options.scale_dtype
        self.scales, self.zero_points = self._search(weight, scheme, importance[features.argsort()])
        # With one group per row, no earlier group passes an error on.
        self.fixed = options.static_groups or self.scales.shape[1] == 1
        self.codes: list[torch.Tensor] = []

    def _search(
        self, weight: torch.Tensor, scheme: WeightScheme, importance: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return search_scales(weight, scheme, importance, self.fractions, self.scale_dtype)

    def enter(self, position: int, feature: int, columns: torch.Tensor) -> None:
        """Select the group of `feature`, the `position`-th in the order of quantization, as the current one."""
        group = (feature if self.fixed else position) // self.group_size
        if not self.fixed and position % self.group_size == 0:
            members = slice(position, position + self.group_size)
            scheme = WeightScheme(self.scheme.dtype, self.scheme.symmetric)
            scales, zero_points = self._search(columns[members].t(), scheme, self.importance[members])
            self.scales[:, group] = scales[:, 0]
            if self.zero_points is not None and zero_points is not None:
                self.zero_points[:, group] = zero_points[:, 0]
        self.scale = self.scales[:, group]
        zero = code_offset(self.scheme.dtype)
        self.zero = zero if self.zero_points is None else self.zero_points[:, group].float()
        self.inverse = 1.0 / self.scale

    def snap(self, column: torch.Tensor) -> torch.Tensor:
        """Round `column` ``[N]`` to the grid of the current group, and append its codes."""
        dtype = self.scheme.dtype
        if dtype in CODEBOOKS:
            codes = nearest_codes(column * self.inverse, dtype)
            values = code_levels(codes, CODEBOOKS[dtype])
        else:
            codes = (column * self.inverse).round_().add_(self.zero).clamp_(*code_range(dtype))
            values = codes - self.zero
        self.codes.append(codes.to(torch.int16))
        return values * self.scale

    def quantized_weight(self, features: torch.Tensor) -> QuantizedWeight:
        """The quantized weight, its codes in input feature order; `features` is the order of quantization."""
        codes = torch.stack(self.codes)[features.argsort()].t()
        codes = plain_codes(codes.to(code_dtype(self.scheme.dtype)), self.scheme.dtype)
        g_idx = None
        if not self.fixed:
            groups = features.argsort() // self.group_size
            g_idx = None if groups.equal(groups.sort().values) else groups.int()
        return QuantizedWeight(codes, self.scales, self.zero_points, g_idx, self.scheme, self.shape)


def _inverse_factor(hessian: torch.Tensor, percdamp: float) -> torch.Tensor:
    """Upper triangular U with ``U^T U`` the inverse of the damped `hessian`; writes to the diagonal of `hessian`.

    ``H = R R^T`` with R upper triangular (a Cholesky factorization in reversed order) gives ``U = R^-1``, without
    forming the inverse of H.
    """
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean())
    diagonal[diagonal == 0] = mean or 1.0
    mean = float(diagonal.mean())
    damping, dtype = percdamp, torch.float32
    while damping <= MAX_DAMPING:
        damped = hessian.to(dtype, copy=True)
        damped.diagonal().add_(damping * mean)
        lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if info == 0:
            factor = torch.linalg.solve_triangular(lower.flip(0, 1), torch.eye(len(lower), dtype=dtype), upper=True)
            factor = factor.float()
            if torch.isfinite(factor).all():
                return factor
        if dtype == torch.float32:
            dtype = torch.float64
            continue
        damping = max(10 * damping, 1e-4)
        warnings.warn(f"GPTQ: the Hessian is near singular; trying percdamp {damping:g}", stacklevel=3)
    raise RuntimeError(f"GPTQ: the Hessian cannot be inverted even with percdamp {MAX_DAMPING:g}; use more samples")
