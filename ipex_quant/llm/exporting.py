"""`export`: write a quantized model as a checkpoint of another tool's format."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import PreTrainedModel

from ..checkpoints.writers import WRITERS, CheckpointWriter
from ..conversion.description import main_dtype
from ..writing import new_directory
from .saved.export_parts import ExportParts
from .saved.gguf_export import write_model
from .saved.gguf_parts import model_metadata
from .saved.parallel import refuse_parts
from .saving import make_readable

GGUF = "gguf"
FORMATS = (*WRITERS, GGUF)
"""Names of the formats that `export` writes."""

SHARD_BYTES = 5_000_000_000
"""Most bytes of tensors in one file, but for a single tensor that is larger."""

_MANY_LAYERS = 16


def export(model: PreTrainedModel, directory: str | os.PathLike, format: str, tokenizer: Any = None) -> None:
    """Write the quantized `model` to the new `directory` as a checkpoint of `format`, and its `tokenizer` if given.

    `format` is "gptq", "awq", "compressed-tensors" or "gguf". Codes, scales and zero points are written as the model
    has them, so that `from_pretrained` with the same compute mode gives the same logits, bit for bit; scales are
    float16 or bfloat16 where these hold their values, else float32, which other tools may round (GGUF has float16
    only). Names are those of the architecture's published checkpoints. Compute modes and quantized caches are no part
    of a format. Embeddings are in float in all but GGUF: quantized ones are written as the values that lookups return,
    with a warning. GGUF is one file, ``model.gguf``, with the tokenizer in it, and holds minimums and two-level scales.

    Raises TypeError for another kind of model, ValueError for another format, a directory that is not empty, a model
    that is not quantized, and a layer that the format cannot hold, which is named with the reason; OSError if a file
    cannot be written.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a transformers model, got {type(model).__name__}")
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {list(FORMATS)}, got {format!r}")
    refuse_parts(model, "export")
    with new_directory(directory, "directory") as out:
        if format == GGUF:
            model_metadata(model.config)  # raises for one that is not written, before anything is unpacked
        parts = ExportParts.of(model, quantized_embeddings=format == GGUF)
        if format == GGUF:
            write_model(out / "model.gguf", model.config, parts, tokenizer)
            return
        writer = WRITERS[format]([layer for layer, _ in parts.layers], parts.in_float, parts.head)
        _write_tensors(out, parts, writer)
        _write_config(out, model, parts, writer.config)
        if format == "gptq":  # where tools look that are older than the entry of config.json
            (out / "quantize_config.json").write_text(json.dumps(writer.config, indent=2), encoding="utf-8")
        if model.can_generate():
            model.generation_config.save_pretrained(out)
        if tokenizer is not None:
            tokenizer.save_pretrained(out)
        make_readable(out)


def _write_config(out: Path, model: PreTrainedModel, parts: ExportParts, quantization: dict[str, Any]) -> None:
    config: Any = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = str(main_dtype(model)).removeprefix("torch.")
    config.quantization_config = quantization
    for own in ("kv_cache_dtype", "token_latency"):  # options of `optimize`
        if hasattr(config, own):
            delattr(config, own)
    if parts.untied and not config.is_encoder_decoder:  # tools would take the embedding for the output layer
        for part in (config, config.get_text_config(decoder=True)):
            if hasattr(part, "tie_word_embeddings"):
                part.tie_word_embeddings = False
    config.save_pretrained(out)


def _write_tensors(out: Path, parts: ExportParts, writer: CheckpointWriter) -> None:
    """Write the tensors in order to one file, or to several with an index where they are more than `SHARD_BYTES`."""
    files: list[list[str]] = []
    shard: dict[str, torch.Tensor] = {}
    held = total = 0

    def flush() -> None:
        save_file(shard, out / f"{len(files)}.safetensors", {"format": "pt"})
        files.append(list(shard))
        shard.clear()

    for name, tensor in _tensors(parts, writer):
        if shard and held + tensor.nbytes > SHARD_BYTES:
            flush()
            held = 0
        shard[name] = tensor.contiguous()
        held, total = held + tensor.nbytes, total + tensor.nbytes
    flush()
    names = [f"model-{index + 1:05}-of-{len(files):05}.safetensors" for index in range(len(files))]
    names = names if len(files) > 1 else ["model.safetensors"]
    for index, name in enumerate(names):
        (out / f"{index}.safetensors").rename(out / name)
    if len(files) > 1:
        weight_map = {tensor: name for name, tensors in zip(names, files, strict=True) for tensor in tensors}
        index_of_files = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index_of_files, indent=2, sort_keys=True)
        (out / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _tensors(parts: ExportParts, writer: CheckpointWriter) -> Iterator[tuple[str, torch.Tensor]]:
    for name, read in parts.others.items():
        yield name, read()
    for layer, bias in tqdm(parts.layers, desc="writing", unit="layer", disable=len(parts.layers) < _MANY_LAYERS):
        for key, tensor in writer.tensors(layer).items():
            yield f"{layer.name}.{key}", tensor
        if bias is not None:
            yield f"{layer.name}.bias", bias
