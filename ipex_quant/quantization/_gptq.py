"""`ipex_quant.quantization.gptq`: calibrate a float model and write a GPTQ checkpoint directory."""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from ..checkpoints import gptq_tensors
from ..nn.linears import is_linear, weight_matrix
from ..nn.stacked_experts import expert_bias
from ..numerics.quantized_weight import QuantizedWeight
from ..numerics.scheme import WeightScheme, WoqWeightDtype
from ..woq.gptq import GptqOptions
from ..woq.gptq_blocks import quantize_blocks
from ..woq.gptq_experts import PARTS, can_quantize_experts

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
) -> Path:
    """Quantize the linears and experts in the transformer blocks of `model` with GPTQ; write a checkpoint directory.

    The signature is IPEX's. `save_dir`, which must not exist or be empty, is what is returned; it holds
    ``model.safetensors`` (sharded when large), ``config.json`` with a `quantization_config` and
    ``quantize_config.json``, and loads with `load_low_precision_checkpoint` and other GPTQ tools. Symmetric weights are
    written in GPTQ version 1, which all tools read; asymmetric ones in version 2 (``gptq_v2``), since version 1 has no
    zero point 0 and readers disagree about its others. Experts in 3-D parameters are calibrated with the tokens routed
    to them, and written one by one, as ``<experts>.3.gate_proj``, ``up_proj`` and ``down_proj``. Embeddings, lm_head
    and all else keep their float weights. `model` comes back as it was.

    - `dataloader` yields samples or batches: a mapping of tensors (``input_ids``, ``attention_mask``, ...), a tensor of
      ``input_ids`` ``[T]`` or ``[B, T]``, or a tuple that begins with one of these. At most `nsamples` sequences are
      used, each cut to its first `pad_max_length` tokens; `use_max_length` skips shorter ones.
    - `group_size` -1 is one group a row; `wbits` is 4 or 8; `percdamp` and `act_order` are GPTQ's.
    - `layer_wise` changes nothing: the walk always holds the inputs of one block only.
    - `compression_dtype` int32 and `compression_dim` 1 (along in_features) are all that the file format has.
    - `scale_dtype` float16 (what most tools expect), bfloat16 or float32.

    Raises ValueError for other values and for a dataloader without usable samples, before anything is computed.
    """
    if wbits not in _DTYPES:
        raise ValueError(f"wbits: expected one of {sorted(_DTYPES)}, got {wbits}")
    if compression_dtype != torch.int32:
        raise ValueError(f"compression_dtype: GPTQ files hold torch.int32 words, got {compression_dtype}")
    if compression_dim != 1:
        raise ValueError(f"compression_dim: GPTQ files are packed along in_features, expected 1, got {compression_dim}")
    if scale_dtype not in _SCALE_DTYPES:
        raise ValueError(f"scale_dtype: expected one of {_SCALE_DTYPES}, got {scale_dtype}")
    directory = Path(save_dir)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"save_dir: {directory} exists and is not empty; give another or remove it")
    scheme = WeightScheme(_DTYPES[wbits], bool(sym), group_size)
    options = GptqOptions(percdamp=percdamp, act_order=act_order, scale_dtype=scale_dtype)
    if layer_wise:
        logger.info("gptq: layer_wise=True needs nothing more, the walk holds one block's inputs at any time")
    batches = calibration_batches(dataloader, nsamples, pad_max_length, use_max_length)

    for name, module in model.named_modules():
        if is_linear(module) and not torch.isfinite(weight_matrix(module)).all():
            raise ValueError(f"{name}: weight: expected finite values, got NaN or Inf")
        if can_quantize_experts(module) and not all(parameter.isfinite().all() for parameter in module.parameters()):
            raise ValueError(f"{name}: expected finite values, got NaN or Inf")
    weights = quantize_blocks(model, batches, scheme, options)
    config = {
        "quant_method": "gptq",
        "bits": wbits,
        "group_size": group_size,
        "sym": bool(sym),
        "desc_act": bool(act_order),
        "static_groups": False,
        "true_sequential": True,
        "damp_percent": percdamp,
        "lm_head": False,
        "checkpoint_format": "gptq" if sym else "gptq_v2",
        "pack_dtype": "int32",
        "meta": {"quantizer": ["ipex_quant"]},
    }
    with _written_whole(directory) as unfinished:
        _write(unfinished, model, weights, config, scale_dtype)
    return directory


def calibration_batches(
    dataloader: Iterable[object], nsamples: int, max_length: int, only_full: bool = False
) -> list[dict[str, torch.Tensor]]:
    """Keyword arguments for a causal language model from whatever a dataloader yields, as `gptq` documents it.

    Raises ValueError when `nsamples` or `max_length` is below 1 or no sample is left, TypeError for another kind of
    item.
    """
    if nsamples < 1 or max_length < 1:
        raise ValueError(f"nsamples and pad_max_length: expected at least 1, got {nsamples} and {max_length}")
    batches: list[dict[str, torch.Tensor]] = []
    wanted = nsamples
    for item in dataloader:
        batch = _as_batch(item)
        rows, length = batch["input_ids"].shape
        if length == 0 or (only_full and length < max_length):
            continue
        batches.append({name: _cut(tensor, rows, length, wanted, max_length) for name, tensor in batch.items()})
        wanted -= len(batches[-1]["input_ids"])
        if wanted <= 0:
            break
    if not batches:
        least = f" of at least pad_max_length={max_length} tokens" if only_full else ""
        raise ValueError(f"dataloader: expected at least one sample{least}, got none")
    return batches


def _cut(tensor: torch.Tensor, rows: int, length: int, wanted: int, max_length: int) -> torch.Tensor:
    """The first `wanted` rows and `max_length` positions of a tensor that has as many as the sample."""
    if tensor.dim() and len(tensor) == rows:
        tensor = tensor[:wanted]
    return tensor[:, :max_length] if tensor.dim() > 1 and tensor.shape[1] == length else tensor


def _as_batch(item: object) -> dict[str, torch.Tensor]:
    while isinstance(item, (tuple, list)) and item:
        item = item[0]
    if isinstance(item, torch.Tensor):
        item = {"input_ids": item}
    if not isinstance(item, Mapping) or "input_ids" not in item:
        raise TypeError(
            "dataloader: expected a tensor of input_ids, a mapping with input_ids, or a tuple that begins with one, "
            f"got {type(item).__name__}"
        )
    batch = {name: torch.as_tensor(value) for name, value in item.items() if name != "labels"}
    if batch["input_ids"].dim() == 1:
        batch = {name: tensor.unsqueeze(0) for name, tensor in batch.items()}
    if batch["input_ids"].dim() != 2:
        raise ValueError(f"input_ids: expected shape [B, T] or [T], got {list(batch['input_ids'].shape)}")
    return batch


@contextmanager
def _written_whole(directory: Path) -> Iterator[Path]:
    """A temporary directory that takes the name of `directory` once everything in it is written."""
    unfinished = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        os.replace(unfinished, directory)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


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
        if not can_quantize_experts(module) or f"{name}.0.{PARTS[0]}_proj" not in weights:
            continue
        for key in module._parameters:
            del kept[f"{name}.{key}"]
        gate_up, down = expert_bias(module, "gate_up"), expert_bias(module, "down")
        for expert in range(module.num_experts):
            biases = (None, None) if gate_up is None else gate_up[expert].chunk(2)
            biases = (*biases, None if down is None else down[expert])
            kept |= {
                f"{name}.{expert}.{part}_proj.bias": bias.clone()
                for part, bias in zip(PARTS, biases, strict=True)
                if bias is not None
            }
    return kept
