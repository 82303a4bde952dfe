"""`ipex_quant.quantization.gptq`: calibrate a float model and write a GPTQ checkpoint directory."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from .. import ops
from ..checkpoints import gptq_tensors
from ..nn.linears import holds_experts, is_linear, weight_matrix
from ..nn.multihead_attention import is_whole
from ..nn.stacked_experts import PROJECTIONS, expert_bias, expert_layout, expert_weight
from ..numerics.quantized_weight import QuantizedWeight
from ..numerics.scheme import WeightScheme, WoqWeightDtype
from ..woq.gptq import GptqOptions
from ..woq.gptq_blocks import named, quantize_blocks
from ..woq.gptq_experts import PARTS, can_quantize_experts
from ..woq.rtn import round_scales
from ..woq.towers import find_towers, patterns
from ..writing import new_directory
from .calibration_batches import MAIN_INPUT, calibration_batches

logger = logging.getLogger("ipex_quant")

_DTYPES = {4: WoqWeightDtype.INT4, 8: WoqWeightDtype.INT8}
_SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


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
) -> Path:
    """Quantize the linears and experts in the transformer blocks of `model` with GPTQ; write a checkpoint directory.

    The signature is IPEX's. `save_dir`, which must not exist or be empty, is what is returned; it holds
    ``model.safetensors`` (sharded when large), ``config.json`` with a `quantization_config` and
    ``quantize_config.json``, and loads with `load_low_precision_checkpoint` and other GPTQ tools. Symmetric weights are
    written in GPTQ version 1, which all tools read; asymmetric ones in version 2 (``gptq_v2``), since version 1 has no
    zero point 0 and readers disagree about its others. Experts in 3-D parameters are calibrated with the tokens routed
    to them, and written one by one, as ``<experts>.3.gate_proj``, ``up_proj`` and ``down_proj``. Embeddings and all
    else keep their float weights, with a warning that names the linears; so does the head, unless `lm_head` asks for
    it. The blocks are those of all towers that the calibration reaches: encoder and decoder, vision and text. `model`
    comes back as it was.

    - `dataloader` yields samples or batches: a mapping of whatever tensors the model takes (``input_ids``,
      ``attention_mask``, ``inputs_embeds``, ``pixel_values``, ``input_features``, ``input_values``, ...), a tensor of
      what it takes first (mostly ``input_ids``, ``[T]`` or ``[B, T]``), or a tuple that begins with one of these. At
      most `nsamples` sequences are used, each cut to its first `pad_max_length` tokens; `use_max_length` skips shorter
      ones. Batches with features of images or audio are not cut in length.
    - `group_size` -1 is one group a row; `wbits` is 4 or 8; `percdamp` and `act_order` are GPTQ's.
    - `layer_wise` changes nothing: the walk always holds the inputs of one block only.
    - `compression_dtype` int32 and `compression_dim` 1 (along in_features) are all that the file format has.
    - `scale_dtype` float16 (what most tools expect), bfloat16 or float32.

    Raises ValueError for other values, for a dataloader without usable samples, and for a weight whose scales
    `scale_dtype` cannot hold, naming it, and OSError for a `save_dir` that cannot be written, before anything is
    computed.
    """
    if wbits not in _DTYPES:
        raise ValueError(f"wbits: expected one of {sorted(_DTYPES)}, got {wbits}")
    if compression_dtype != torch.int32:
        raise ValueError(f"compression_dtype: GPTQ files hold torch.int32 words, got {compression_dtype}")
    if compression_dim != 1:
        raise ValueError(f"compression_dim: GPTQ files are packed along in_features, expected 1, got {compression_dim}")
    if scale_dtype not in _SCALE_DTYPES:
        raise ValueError(f"scale_dtype: expected one of {_SCALE_DTYPES}, got {scale_dtype}")
    scheme = WeightScheme(_DTYPES[wbits], bool(sym), group_size)
    options = GptqOptions(percdamp=percdamp, act_order=act_order, scale_dtype=scale_dtype)
    if layer_wise:
        logger.info("gptq: layer_wise=True needs nothing more, the walk holds one block's inputs at any time")
    also = chosen_head(model, lm_head)
    main_input = getattr(model, "main_input_name", MAIN_INPUT)
    batches = calibration_batches(dataloader, nsamples, pad_max_length, use_max_length, main_input)

    _check_weights(model, scheme, scale_dtype, also)
    config = {
        "quant_method": "gptq",
        "bits": wbits,
        "group_size": group_size,
        "sym": bool(sym),
        "desc_act": bool(act_order),
        "static_groups": False,
        "true_sequential": True,
        "damp_percent": percdamp,
        "lm_head": lm_head,
        "checkpoint_format": "gptq" if sym else "gptq_v2",
        "pack_dtype": "int32",
        "meta": {"quantizer": ["ipex_quant"]},
    }
    with new_directory(save_dir, "save_dir") as unfinished:
        weights = quantize_blocks(model, batches, scheme, options, also)
        done = {*weights, *(name.rsplit(".", 2)[0] for name in weights)}  # experts are there part by part
        kinds = is_linear, holds_experts, is_whole
        layers = [name for name, module in model.named_modules() if any(is_kind(module) for is_kind in kinds)]
        warn_of_rest(model, [name for name in layers if name not in done], "gptq: these linear layers stay in float")
        _write(unfinished, model, weights, config, scale_dtype)
    return Path(save_dir)


def _check_weights(model: nn.Module, scheme: WeightScheme, scale_dtype: torch.dtype, also: Iterable[str]) -> None:
    """Raise ValueError for a weight with NaN or Inf, or, of those to quantize, with scales beyond `scale_dtype`."""
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


def output_head(model: nn.Module) -> str | None:
    """Name of the linear that makes logits of tokens, as transformers tells it; None for a model without one."""
    get = getattr(model, "get_output_embeddings", None)
    head = None if get is None else get()
    return next((name for name, module in model.named_modules() if module is head and is_linear(module)), None)


def chosen_head(model: nn.Module, lm_head: bool) -> list[str]:
    """The output head, if `lm_head` asks for it; ValueError when there is none."""
    head = output_head(model) if lm_head else None
    if lm_head and head is None:
        raise ValueError(
            f"lm_head: {type(model).__name__} has no output head that is a linear layer; give lm_head=False"
        )
    return [head] if lm_head else []


def warn_of_rest(model: nn.Module, names: Iterable[str], what: str) -> None:
    """Tell which linears, of those that `names` has in `model`, an algorithm did not quantize; but for the head."""
    head = output_head(model)
    rest = patterns(model, [name for name in names if name != head])
    if rest:
        warnings.warn(f"{what}: {', '.join(rest)}", stacklevel=3)


def _write(
    directory: Path,
    model: nn.Module,
    weights: Mapping[str, QuantizedWeight],
    config: Mapping[str, object],
    scale_dtype: torch.dtype,
) -> None:
    from huggingface_hub import save_torch_state_dict

    tensors = {
        name: tensor for name, tensor in model.state_dict().items() if name.removesuffix(".weight") not in weights
    }
    v2 = config["checkpoint_format"] == "gptq_v2"
    tensors = _without_stacked_experts(tensors, model, weights)
    for name, qw in weights.items():
        stored = gptq_tensors(qw, v2=v2, scale_dtype=scale_dtype)
        tensors |= {f"{name}.{key}": tensor for key, tensor in stored.items()}
    tied = list(getattr(model, "_tied_weights_keys", None) or [])
    save_torch_state_dict(tensors, directory, metadata={"format": "pt"}, shared_tensors_to_discard=tied)

    (directory / "quantize_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    model_config = copy.deepcopy(getattr(model, "config", None))
    if hasattr(model_config, "save_pretrained"):
        model_config.architectures = model_config.architectures or [type(model).__name__]
        model_config.quantization_config = dict(config)
        model_config.save_pretrained(directory)
    else:
        content = json.dumps({"quantization_config": config}, indent=2)
        (directory / "config.json").write_text(content, encoding="utf-8")
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.to_json_file(directory / "generation_config.json")


def _without_stacked_experts(
    tensors: Mapping[str, torch.Tensor], model: nn.Module, weights: Mapping[str, QuantizedWeight]
) -> dict[str, torch.Tensor]:
    """`tensors` without the experts that `weights` has one by one, but with the biases of their parts."""
    kept = dict(tensors)
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
