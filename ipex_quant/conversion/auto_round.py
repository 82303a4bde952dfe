"""`ipex_quant.quantization.auto_round`: quantize the weights of a float model with AutoRound."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import nn
from torch.ao.quantization import QConfigMapping

from ..nn.linears import is_linear
from ..woq.auto_round import AutoRoundOptions
from ..woq.auto_round_blocks import auto_round_blocks
from .calibration_batches import Samples, calibration_batches
from .found import FoundWeights
from .gptq import warn_of_rest
from .prepare import convert_some, prepare
from .rules import choose_weight_only
from .swap import with_split_attentions


def auto_round(
    model: nn.Module,
    dataloader: Iterable[object],
    quantization_config: QConfigMapping,
    options: AutoRoundOptions | None = None,
    nsamples: int = 128,
    use_max_length: bool = False,
    pad_max_length: int = 2048,
    inplace: bool = False,
    work_dir: str | Path | None = None,
) -> nn.Module:
    """Quantize the linear layers of `model` by `quantization_config`, tuning the rounding in transformer blocks.

    The result has `WeightOnlyQuantizedLinear` modules and is ready for inference, `llm.optimize` (without a
    `quantization_config`) and `llm.save`. All integer weight dtypes, group sizes and compute modes are supported. The
    blocks of all towers that the calibration reaches are tuned. Other linears, the head, experts in 3-D parameters and
    layers in NF4, FP4, IQ4 or FP8 are rounded to nearest, with a warning that names the linears in blocks.

    - `dataloader`, `nsamples`, `use_max_length` and `pad_max_length` are those of `gptq`.
    - `options` sets how long to tune: the time is proportional to steps, samples in each and their length.
    - Without `inplace` the result is a copy and `model` is unchanged.
    - `work_dir`, a directory, keeps finished blocks: after an interruption, the same call goes on after them, with the
      same result. It may be deleted afterwards.

    Raises TypeError for a `quantization_config` that is no mapping; ValueError for one that is not weight-only, a
    dataloader without usable samples, a model without transformer blocks, NaN or Inf in a weight, which it names, and a
    `work_dir` of another run; RuntimeError for a loss that is NaN or Inf. `model` is then unchanged.
    """
    walked = with_split_attentions(model)
    chosen = choose_weight_only(quantization_config, walked, "AutoRound")
    schemes = {name: qconfig.scheme for name, qconfig in chosen.items() if not qconfig.scheme.dtype.is_float}
    batches = calibration_batches(model, dataloader, Samples(nsamples, pad_max_length, use_max_length))
    kept = None if work_dir is None else Path(work_dir)
    weights = auto_round_blocks(walked, batches, schemes.get, options, kept)
    rest = [name for name in chosen if is_linear(walked.get_submodule(name)) and name not in weights]
    warn_of_rest(walked, rest, "auto_round: these linear layers are rounded to nearest")

    model = prepare(model, quantization_config, inplace=inplace)
    FoundWeights(weights).put_into(model)
    return convert_some(model, inplace=True)
