"""`ipex_quant.quantization.gptq`: calibrate a float model and write a GPTQ checkpoint directory."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import ops
from ..checkpoints.gptq import BITS
from ..checkpoints.writers import GptqWriter, Layer
from ..nn.linears import holds_experts, is_linear, output_head, weight_matrix
from ..nn.multihead_attention import is_whole
from ..nn.stacked_experts import PROJECTIONS, expert_bias, expert_layout, expert_weight
from ..numerics.exact_scales import SCALE_DTYPES
from ..numerics.quantized_weight import QuantizedWeight
from ..numerics.scheme import WeightScheme, WoqWeightDtype
from ..woq.gptq import GptqOptions
from ..woq.gptq_blocks import named, quantize_blocks
from ..woq.gptq_experts import PARTS, can_quantize_experts
from ..woq.rtn import round_scales
from ..woq.towers import find_towers, patterns
from ..writing import new_directory
from .calibration_batches import Samples, calibration_batches

logger = logging.getLogger("ipex_quant")


def gptq(
    model: nn.Module,
    dataloader: Iterable[object],
    group_size: int = 128,
    wbits: int = 4,
    sym: bool = False,
    percdamp: float = 0.01,
    act_order: bool = False,
    nsamples: int = 128,
    use_max_length: bool = False,
    pad_max_length: int = 2048,
    layer_wise: bool = False,
    compression_dtype: torch.dtype = torch.int32,
    compression_dim: int = 1,
    scale_dtype: torch.dtype = torch.float16,
    save_dir: str | Path = "saved_results",
    lm_head: bool = False,
    static_groups: bool = False,
    clip_steps: int = GptqOptions.clip_steps,
    correction: float = GptqOptions.correction,
) -> Path:
    """Quantize the linears and experts in the transformer blocks of `model` with GPTQ; write a checkpoint directory.

    The signature is IPEX's, up to `save_dir`. Returns `save_dir`, which must be empty or not exist yet; it loads with
    `load_low_precision_checkpoint` and other GPTQ tools, in GPTQ version 1, which all tools read, or where a zero point
    is 0 in version 2 (``gptq_v2``). Experts in 3-D parameters are calibrated with the tokens
    routed to them, and written one by one, as ``<experts>.3.gate_proj``, ``up_proj`` and ``down_proj``. GPTQ quantizes
    the blocks of all towers that the calibration reaches: encoder and decoder, vision and text. All other weights stay
    in float, with a warning that names the linears; so does the head, unless `lm_head` is set. `model` is unchanged.

    - `dataloader` yields samples or batches: a mapping of the model's input tensors (``input_ids``, ``attention_mask``,
      ``inputs_embeds``, ``pixel_values``, ``input_features``, ``input_values``, ...), a tensor that is its main input
      (mostly ``input_ids``, ``[T]`` or ``[B, T]``), or a tuple that begins with one of these. At most `nsamples`
      sequences are used, each cut to its first `pad_max_length` tokens; `use_max_length` skips shorter ones. Batches
      with features of images or audio are not cut in length.
    - `group_size` -1 is one group per row; `wbits` is 2, 3, 4 or 8; `percdamp` and `act_order` are GPTQ's.
    - `layer_wise` has no effect: only the inputs of one block are in memory at any time, quantized and in float.
    - `compression_dtype` must be int32 and `compression_dim` 1 (along in_features), as in the file format.
    - `scale_dtype` is float16 (which most tools expect), bfloat16 or float32.
    - `static_groups` keeps groups in the order of the features with `act_order` too, which is as accurate and loads
      without a ``g_idx``; `clip_steps` is the number of smaller ranges to try for each group, and `correction` the
      share of the errors of earlier layers that a layer corrects, with inputs of the float model too.

    Raises ValueError for other values, a dataloader without usable samples, and a weight whose scales `scale_dtype`
    cannot represent, which it names; OSError for a `save_dir` that cannot be written. Both come before any computation.
    """
    dtypes = {dtype.bits: dtype for dtype in WoqWeightDtype if dtype.has_integers and dtype.bits in BITS}
    if wbits not in dtypes:
        raise ValueError(f"wbits: expected one of {sorted(dtypes)}, got {wbits}")
    if compression_dtype != torch.int32:
        raise ValueError(f"compression_dtype: GPTQ files hold torch.int32 words, got {compression_dtype}")
    if compression_dim != 1:
        raise ValueError(f"compression_dim: GPTQ files are packed along in_features, expected 1, got {compression_dim}")
    if scale_dtype not in SCALE_DTYPES:
        raise ValueError(f"scale_dtype: expected one of {SCALE_DTYPES}, got {scale_dtype}")
    scheme = WeightScheme(dtypes[wbits], bool(sym), group_size)
    options = GptqOptions(
        percdamp,
        bool(act_order),
        bool(static_groups),
        clip_steps,
        correction=correction,
        scale_dtype=scale_dtype,
    )
    if layer_wise:
        logger.info("gptq: layer_wise=True needs nothing more, the walk holds one block's inputs at any time")
    run = GptqRun.of(model, dataloader, scheme, options, Samples(nsamples, pad_max_length, use_max_length), lm_head)
    with new_directory(save_dir, "save_dir") as unfinished:
        weights = run.weights()
        in_float = [name for name, module in model.named_modules() if is_linear(module) and name not in weights]
        writer = GptqWriter(
            [Layer(name, partial(weights.__getitem__, name)) for name in weights],
            in_float,
            output_head(model),
            scale_dtype=scale_dtype,
            percdamp=percdamp,
            act_order=options.act_order and not options.static_groups,
        )
        _write(unfinished, model, writer, _other_tensors(model, weights))
    return Path(save_dir)


@dataclass(frozen=True)
class GptqRun:
    """A GPTQ run with checked inputs; `weights` runs it.

    `also` names layers outside of the transformer blocks to quantize.
    """

    model: nn.Module
    batches: Sequence[Mapping[str, Any]]
    scheme: WeightScheme
    options: GptqOptions
    also: Sequence[str] = ()

    @classmethod
    def of(
        cls,
        model: nn.Module,
        dataloader: Iterable[object],
        scheme: WeightScheme,
        options: GptqOptions,
        samples: Samples,
        lm_head: bool = False,
    ) -> GptqRun:
        """Read `samples` from `dataloader`; raises ValueError and TypeError as `gptq` does."""
        also = chosen_head(model, lm_head)
        batches = calibration_batches(model, dataloader, samples)
        _check_weights(model, scheme, options.scale_dtype, also)
        return cls(model, batches, scheme, options, also)

    def weights(self) -> dict[str, QuantizedWeight]:
        """Quantized weights of linears and experts, by name; warns of the linears that stay in float."""
        weights = quantize_blocks(self.model, self.batches, self.scheme, self.options, self.also)
        done = {*weights, *(name.rsplit(".", 2)[0] for name in weights)}  # experts are named part by part
        kinds = is_linear, holds_experts, is_whole
        layers = [name for name, module in self.model.named_modules() if any(is_kind(module) for is_kind in kinds)]
        rest = [name for name in layers if name not in done]
        warn_of_rest(self.model, rest, "gptq: these linear layers stay in float", stacklevel=4)
        return weights


def _check_weights(model: nn.Module, scheme: WeightScheme, scale_dtype: torch.dtype, also: Iterable[str]) -> None:
    """Raise ValueError for a weight with NaN or Inf, and for scales that `scale_dtype` cannot represent."""
    towers = tuple(f"{name}." for name in find_towers(model))
    for name, module in model.named_modules():
        if is_linear(module):
            matrices = [weight_matrix(module)]
            if not matrices[0].isfinite().all():
                raise ValueError(f"{name}: weight: expected finite values, got NaN or Inf")
        elif can_quantize_experts(module):
            if not all(parameter.isfinite().all() for parameter in module.parameters()):
                raise ValueError(f"{name}: expected finite values, got NaN or Inf")
            matrices = [expert_weight(module, part, i) for part in PROJECTIONS for i in range(len(module.down_proj))]
        else:
            continue
        if scale_dtype == torch.float32 or not (name.startswith(towers) or name in also):
            continue
        for matrix in matrices:
            with named(name):
                round_scales(ops.quantize_weight(matrix, scheme).scales, scale_dtype)


def chosen_head(model: nn.Module, lm_head: bool) -> list[str]:
    """The name of the output head in a list if `lm_head`, else no name; ValueError if the model has no head."""
    head = output_head(model) if lm_head else None
    if lm_head and head is None:
        raise ValueError(
            f"lm_head: {type(model).__name__} has no output head that is a linear layer; give lm_head=False"
        )
    return [head] if lm_head else []


def warn_of_rest(model: nn.Module, names: Iterable[str], what: str, stacklevel: int = 3) -> None:
    """Warn that the layers `names` of `model`, except for the head, were not quantized; `what` begins the message."""
    head = output_head(model)
    rest = patterns(model, [name for name in names if name != head])
    if rest:
        warnings.warn(f"{what}: {', '.join(rest)}", stacklevel=stacklevel)


def _write(directory: Path, model: nn.Module, writer: GptqWriter, others: Mapping[str, torch.Tensor]) -> None:
    """Write a checkpoint of `model` into the empty `directory`: the layers of `writer` and the tensors `others`.

    It holds ``model.safetensors`` (sharded when large), the configuration in ``config.json`` and again as
    ``quantize_config.json``, and the generation config if there is one.
    """
    from huggingface_hub import save_torch_state_dict

    tensors = dict(others)
    for layer in writer.layers:
        tensors |= {f"{layer.name}.{key}": tensor for key, tensor in writer.tensors(layer).items()}
    tied = list(getattr(model, "_tied_weights_keys", None) or [])
    save_torch_state_dict(tensors, directory, metadata={"format": "pt"}, shared_tensors_to_discard=tied)

    config = writer.config
    (directory / "quantize_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    model_config: Any = copy.deepcopy(getattr(model, "config", None))
    if hasattr(model_config, "save_pretrained"):
        model_config.architectures = model_config.architectures or [type(model).__name__]
        model_config.quantization_config = config
        model_config.save_pretrained(directory)
    else:
        content = json.dumps({"quantization_config": config}, indent=2)
        (directory / "config.json").write_text(content, encoding="utf-8")
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.to_json_file(directory / "generation_config.json")


def _other_tensors(model: nn.Module, weights: Mapping[str, QuantizedWeight]) -> dict[str, torch.Tensor]:
    """The state dict of `model` without the quantized `weights`, with the biases of quantized experts one by one."""
    kept = {name: tensor for name, tensor in model.state_dict().items() if name.removesuffix(".weight") not in weights}
    for name, module in model.named_modules():
        if not can_quantize_experts(module) or f"{name}.0.{PARTS[-1]}_proj" not in weights:
            continue
        for key in module._parameters:
            del kept[f"{name}.{key}"]
        gate_up, down = expert_bias(module, "gate_up"), expert_bias(module, "down")
        blocks = expert_layout(module).blocks
        for expert in range(len(module.down_proj)):
            biases = (None,) * blocks if gate_up is None else gate_up[expert].chunk(blocks)
            biases = (*biases, None if down is None else down[expert])
            kept |= {
                f"{name}.{expert}.{part}_proj.bias": bias.clone()
                for part, bias in zip(PARTS[-1 - blocks :], biases, strict=True)
                if bias is not None
            }
    return kept
