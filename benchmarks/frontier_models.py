"""The models of frontier.py: a float directory, a float GGUF file, calibration windows and an evaluation text each."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from gguf_files import model_file
from machine import ROOT
from rounds import write_json
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ipex_quant import data, evaluation, llm
from ipex_quant.llm.dequantize import dequantize_model
from ipex_quant.llm.saved.export_parts import ExportParts
from ipex_quant.llm.saved.gguf_export import write_model
from ipex_quant.nn.fused_forward import restore_forwards
from ipex_quant.writing import new_directory

BUILD = ROOT / "build" / "frontier"
EMBEDDED = "embedded"
FILES = {"SmolLM2-135M": "SmolLM2-135M Q4_1", "Gemma-3-270M": "Gemma-3-270M Q4_K_M"}
"""Names in gguf_files.py of the files that the models come from."""

NAMES = (EMBEDDED, *FILES)
WINDOWS = {EMBEDDED: (64, 256)}
"""Calibration windows and tokens of each, where they are not `OF_REAL_MODELS`."""

OF_REAL_MODELS = (64, 512)
NEIGHBOURS = 16
"""Weights of a row that share a scale in all types of the files."""


@dataclass(frozen=True)
class Model:
    """A float model with the texts that it is calibrated and measured on.

    `windows` is a JSON file of the token ids of all calibration windows, of `length` tokens each, `calibration` the
    same as text, for tools that take no tokens.
    """

    name: str
    folder: Path
    length: int
    text: str

    @property
    def directory(self) -> Path:
        return self.folder / "float"

    @property
    def gguf(self) -> Path:
        return self.folder / "float.gguf"

    @property
    def windows(self) -> Path:
        return self.folder / "windows.json"

    @property
    def calibration(self) -> Path:
        return self.folder / "calibration.txt"

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.directory)

    def load(self) -> PreTrainedModel:
        """The model in float32, as transformers computes it."""
        return AutoModelForCausalLM.from_pretrained(self.directory, dtype=torch.float32).eval()


def prepare(name: str, packages: Path | None, calibration: str, text: str) -> Model:
    """Write what is missing of a model's files in `build/frontier`, and return them."""
    samples, length = WINDOWS.get(name, OF_REAL_MODELS)
    model = Model(name, BUILD / name, length, text)
    model.folder.mkdir(parents=True, exist_ok=True)
    if not model.directory.is_dir():
        with new_directory(model.directory, "float model") as out:
            _write_float(name, packages, out)
    if not model.gguf.is_file():
        _write_gguf(model)
    tokenizer = model.tokenizer()
    windows = _windows(tokenizer, calibration, samples, length)
    write_json(model.windows, windows)
    texts = tokenizer.batch_decode(windows, skip_special_tokens=True)
    model.calibration.write_text("".join(texts), encoding="utf-8")
    return model


def _write_float(name: str, packages: Path | None, out: Path) -> None:
    if name == EMBEDDED:
        model = AutoModelForCausalLM.from_pretrained(data.embedded_model_dir(), dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(data.embedded_model_dir())
    else:
        file = model_file(FILES[name], packages or ROOT / "build" / "real-models" / "packages")
        dequantized = dequantize_model(llm.from_pretrained(file, torch.float32), torch.float32)
        restore_forwards(dequantized)
        config = copy.deepcopy(dequantized.config)
        vars(config).pop("quantization_config", None)
        model = type(dequantized)(config)
        model.load_state_dict(dequantized.state_dict())
        scatter(model)
        tokenizer = llm.load_tokenizer(file)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


@torch.no_grad()
def scatter(model: nn.Module) -> None:
    """Move the weights of linear layers and embeddings, which lie on the grid of a quantized file, off that grid.

    Each goes to a random place at most half a step away: to where an unquantized weight may have been, of which the
    file has the nearest grid point. A producer whose grid is the file's would have no error otherwise.
    """
    generator = torch.Generator().manual_seed(0)
    for weight in dict.fromkeys(m.weight for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding)):
        places = torch.rand(weight.shape, generator=generator) - 0.5
        weight.add_((places.view(-1, NEIGHBOURS) * grid_steps(weight)).view_as(weight))


def grid_steps(weight: torch.Tensor) -> torch.Tensor:
    """The smallest distance of two different weights among each `NEIGHBOURS`, a column; 0 where all are equal."""
    gaps = weight.reshape(-1, NEIGHBOURS).sort(dim=1).values.diff(dim=1)
    rounding = 1e-4 * gaps.amax(dim=1, keepdim=True)
    return gaps.where(gaps > rounding, torch.inf).amin(dim=1, keepdim=True).nan_to_num(posinf=0.0)


def _write_gguf(model: Model) -> None:
    """The float model as a GGUF file with float32 tensors."""
    loaded = model.load()
    tied = loaded.all_tied_weights_keys
    tensors: dict[str, Callable[[], torch.Tensor]] = {
        name: partial(torch.Tensor.detach, tensor) for name, tensor in loaded.state_dict().items() if name not in tied
    }
    parts = ExportParts([], [], tensors, [], None, False)
    write_model(model.gguf, loaded.config, parts, model.tokenizer())


def _windows(tokenizer: PreTrainedTokenizerBase, text: str, samples: int, length: int) -> list[list[int]]:
    """At most `samples` windows of `length` tokens, spread over all of the text, each after what a text begins with."""
    prefix = evaluation.first_tokens(tokenizer)
    length -= len(prefix)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    available = len(ids) // length
    if not available:
        raise ValueError(f"--calibration: expected at least {length} tokens, got {len(ids)}; give a longer text")
    count = min(samples, available)
    starts = [length * (index * available // count) for index in range(count)]
    return [prefix + ids[start : start + length] for start in starts]


def clear(path: Path) -> None:
    """Remove a directory or a file that an interrupted producer left."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def read_windows(path: Path) -> list[list[int]]:
    """The windows that `prepare` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))
