"""Bytes and accuracy of a quantized model that any producer wrote, for frontier.py.

A result is a directory that this package reads, whose weights are dequantized to float32; or a float model, in
`float.gguf` or as a directory, of weights that its producer dequantized, and `sizes.json`: type, bytes and numbers of
each tensor by its name.
Both run in transformers' own code, so that producers differ by their weights only.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from frontier_models import Model
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from ipex_quant import evaluation, llm
from ipex_quant.llm.dequantize import dequantize_model
from ipex_quant.llm.loading import load_float
from ipex_quant.nn.fused_forward import restore_forwards

FLOAT_BYTES = 2
"""Bytes of a number in float: models are stored in bfloat16 or float16, whatever a producer was given."""

LINEARS, TABLES, REST = "linears", "embedding and head", "rest"
LINEAR_NAME = re.compile(r"(blk\.\d+\.(attn_([qkv]|output)|ffn_(gate|up|down))|model\.layers\..+_proj)\.weight")
TABLE_NAME = re.compile(r"(token_embd|output|model\.embed_tokens|lm_head)\.weight")
SIZES = "sizes.json"
FLOATS = ("F32", "F16", "BF16", "torch.float32")


@dataclass(frozen=True)
class Sizes:
    """Bytes of the linear layers in blocks, of embedding and head, and of the rest; whether tables are quantized."""

    bytes: Mapping[str, int]
    tables_in_float: bool

    def record(self, weights: Mapping[str, int]) -> dict[str, Any]:
        """Entries of a record, with bytes a weight relative to the numbers of `weights`."""
        total = sum(self.bytes.values())
        return {
            "megabytes": round(total / 1e6, 3),
            "bytes_per_weight": round(total / sum(weights.values()), 4),
            "linear_bytes_per_weight": round(self.bytes[LINEARS] / weights[LINEARS], 4),
            "table_bytes_per_weight": round(self.bytes[TABLES] / weights[TABLES], 4),
            "tables_in_float": self.tables_in_float,
        }


def weight_counts(model: PreTrainedModel) -> dict[str, int]:
    """Numbers of a float model by their kind; tied tensors count once."""
    kinds = _kinds(model)
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        counts[kinds.get(name.removesuffix(".weight"), REST)] += parameter.numel()
    return dict(counts)


def _kinds(model: PreTrainedModel) -> dict[str, str]:
    """The kinds of a model's linear layers and embeddings, by name."""
    head = model.get_output_embeddings()
    kinds = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) or module is head:
            kinds[name] = TABLES
        elif isinstance(module, nn.Linear):
            kinds[name] = LINEARS
    return kinds


def directory_sizes(directory: Path, model: PreTrainedModel, ours: bool) -> Sizes:
    """Bytes of what the files in `directory` hold of the float `model`.

    Tensors in float count `FLOAT_BYTES` a number, and so do scales that another producer stores in float32 since it was
    given a model in float32. An order of features that is none, shapes and biases of zeros count nothing.
    """
    kinds = _kinds(model)
    found: dict[str, list[tuple[str, torch.Tensor]]] = {}
    for name, tensor in _tensors(directory):
        module = next((each for each in _parents(name) if each in kinds), name)
        found.setdefault(module, []).append((name.removeprefix(f"{module}."), tensor))
    sizes: Counter[str] = Counter()
    in_float = True
    for module, tensors in found.items():
        kind = kinds.get(module, REST)
        is_float = all(key in ("weight", "bias", module) and tensor.is_floating_point() for key, tensor in tensors)
        if kind == TABLES and not is_float:
            in_float = False
        sizes[kind] += sum(_stored(key, tensor, is_float, ours) for key, tensor in tensors)
    return Sizes(sizes, in_float)


def _stored(key: str, tensor: torch.Tensor, in_float: bool, ours: bool) -> int:
    if key.endswith("shape") or (key == "bias" and not tensor.any()):
        return 0
    if key.endswith("g_idx") and bool((tensor.diff() >= 0).all()):
        return 0
    rounded = in_float or (tensor.dtype == torch.float32 and not ours)
    return tensor.numel() * FLOAT_BYTES if rounded and tensor.itemsize > 1 else tensor.nbytes


def _tensors(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as content:
            for name in content.keys():  # noqa: SIM118  # it is no dict
                yield name, content.get_tensor(name)


def _parents(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def told_sizes(file: Path) -> Sizes:
    """Bytes of the tensors that `file`, a `SIZES`, tells."""
    sizes: Counter[str] = Counter()
    in_float = True
    for name, (kind, nbytes, count) in json.loads(file.read_text(encoding="utf-8")).items():
        is_float = kind in FLOATS
        place = LINEARS if LINEAR_NAME.fullmatch(name) else TABLES if TABLE_NAME.fullmatch(name) else REST
        in_float &= is_float or place != TABLES
        sizes[place] += count * FLOAT_BYTES if is_float else nbytes
    return Sizes(sizes, in_float)


class Predictor(nn.Module):
    """Logits of a model in float, whose last hidden states are computed once for each window, and kept."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.hidden: dict[bytes, torch.Tensor] = {}

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        key = input_ids.numpy().tobytes()
        if key not in self.hidden:
            self.hidden[key] = self.model.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
        return SimpleNamespace(logits=self.model.get_output_embeddings()(self.hidden[key]))


def load_result(path: Path) -> PreTrainedModel:
    """The model in float32 with the weights that a producer wrote to `path`, as transformers computes it."""
    if (path / SIZES).is_file():
        file = path / "float.gguf"
        return load_float(file if file.is_file() else path, torch.float32)
    model = dequantize_model(llm.from_pretrained(path, torch.float32), torch.float32)
    restore_forwards(model)
    return model


def measure(model: Model, reference: Predictor, path: Path, tokens: int, ours: bool) -> dict[str, Any]:
    """The entries of a record for what a producer wrote to `path`."""
    counts = weight_counts(reference.model)
    sizes = told_sizes(path / SIZES) if (path / SIZES).is_file() else directory_sizes(path, reference.model, ours)
    tokenizer = model.tokenizer()
    quantized = Predictor(load_result(path))
    result = evaluation.compare(reference, quantized, tokenizer, model.text, model.length, tokens)
    return sizes.record(counts) | {
        "kl": float(f"{result.kl_divergence:.4g}"),
        "kl_99th_percentile": float(f"{result.kl_99th_percentile:.4g}"),
        "kl_largest": float(f"{result.kl_largest:.4g}"),
        "top1_agreement": round(result.top1_agreement, 4),
        "perplexity": round(result.perplexity, 3),
        "reference_perplexity": round(result.reference_perplexity, 3),
        "tokens": result.tokens,
    }
