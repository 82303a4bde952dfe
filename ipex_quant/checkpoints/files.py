"""Reading the tensors and the quantization configuration of a checkpoint directory."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch

from ..errors import ArgumentError
from ..reading import read_json, shown
from .file_tensors import Stored, file_tensors
from .gguf import gguf_tensors
from .gguf_file import find_gguf, open_gguf
from .registry import format_from_config
from .sharding import shard_low_precision_checkpoint

T = TypeVar("T")

CONFIG_FILES = ("config.json", "quant_config.json", "quantize_config.json", "qconfig.json")
"""Files that may hold the quantization configuration, first match wins; in config.json: entry `quantization_config`."""

METHOD_OF_FILE = {"quant_config.json": "awq", "quantize_config.json": "gptq", "qconfig.json": "neural-compressor"}
"""`quant_method` implied by a file's name, for files that do not state it."""

MAIN_FILES = ("model.safetensors", "pytorch_model.bin")
"""Files that hold the whole checkpoint when there is no index; others of the same suffix are then ignored."""


def load_low_precision_checkpoint(
    pathname: str | Path, rank: int = 0, world_size: int = 1
) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """Read a quantized checkpoint directory: ``(state_dict, config)`` for `llm.optimize`.

    A GGUF file, or a directory with one, gives tensors under the names of a transformers model, and ``quant_method``
    "gguf". Else the tensors come from safetensors files, else from .bin, .pt or .pth files: those that an index names,
    or all. No file may hold anything but tensors. `config` is the quantization configuration as stored, with
    `quant_method` and the entries of that method (`bits`, `group_size`, ...). With a `world_size` the tensors are the
    shards of one `rank`, in grains of a group: see `shard_low_precision_checkpoint`. Raises ValueError for anything
    missing, broken or not supported.
    """
    if not 0 <= rank < world_size:
        raise ArgumentError(f"rank: expected one of 0..{world_size - 1}, got {rank} of {world_size}")
    directory = Path(pathname)
    gguf = find_gguf(directory)
    if gguf is not None:
        return _of_gguf(gguf, world_size)
    if directory.is_file():
        raise ArgumentError(
            f"pathname: expected a checkpoint directory, got the file {directory}; give the directory that it and its "
            "configuration are in"
        )
    if not directory.is_dir():
        raise ArgumentError(f"{directory}: expected a checkpoint directory, and there is none")
    config = read_quantization_config(directory)
    format_from_config(config)  # raises for an unsupported format before gigabytes are read
    tensors = read_tensors(directory)
    return (tensors if world_size == 1 else _shard(directory, tensors, config, rank, world_size)), config


def _of_gguf(path: Path, world_size: int) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    if world_size != 1:
        raise ArgumentError(f"world_size: expected 1 for the GGUF file {path}, got {world_size}")
    return {name: stored[...] for name, stored in gguf_tensors(open_gguf(path)).items()}, {"quant_method": "gguf"}


def _shard(
    directory: Path, tensors: dict[str, torch.Tensor], config: Mapping[str, Any], rank: int, world_size: int
) -> dict[str, torch.Tensor]:
    if not (directory / "config.json").is_file():
        raise ArgumentError(f"{directory}: Cannot find config.json, which tells the heads to split by")
    group_size = config.get("group_size", config.get("q_group_size", -1))
    options = config["quant_method"], group_size if group_size > 0 else 64
    bits = config.get("bits", config.get("w_bit", 4))
    model_config = read_json(directory / "config.json")
    return shard_low_precision_checkpoint(
        tensors, model_config, rank, world_size, *options, bool(config.get("desc_act")), bits
    )


def read_quantization_config(directory: Path) -> dict[str, object]:
    """The quantization configuration of a checkpoint directory; raises ValueError naming the files looked for."""
    config = find_quantization_config(directory)
    if config is None:
        raise ArgumentError(
            f"{directory}: no quantization configuration; looked for config.json with an entry quantization_config, "
            + ", ".join(CONFIG_FILES[1:])
        )
    return config


def find_quantization_config(directory: Path) -> dict[str, object] | None:
    """The quantization configuration of a model directory, None if it has none; ValueError for one that is broken."""
    for name in CONFIG_FILES:
        if not (directory / name).is_file():
            continue
        config: Any = read_json(directory / name)
        if name == "config.json":
            config = _entry(config)
        if config is None:
            continue
        if not isinstance(config, dict):
            raise ArgumentError(
                f"{directory / name}: expected a JSON object as configuration, got {type(config).__name__}"
            )
        method = METHOD_OF_FILE.get(name)
        return config if "quant_method" in config or method is None else config | {"quant_method": method}
    return None


def _entry(config: dict[str, Any]) -> Any:
    """The quantization configuration in a model's `config`, which may be that of its text model."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in ("quantization_config", "compression_config"):  # the second is compressed-tensors' old name
            if part.get(key) is not None:
                return part[key]
    return None


def read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint directory, memory-mapped where the file allows it."""
    for suffix, read_file in _READERS.items():
        files = _files(directory, suffix)
        if files:
            return _merged(files, read_file)
    raise ArgumentError(f"{directory}: no checkpoint file; looked for {', '.join('*' + suffix for suffix in _READERS)}")


def open_tensors(directory: Path) -> dict[str, Stored]:
    """All tensors of a checkpoint directory by name; those of safetensors files are read when they are indexed.

    Raises ValueError for anything missing or broken, as `file_tensors` does.
    """
    files = _files(directory, ".safetensors")
    return _merged(files, file_tensors) if files else dict(read_tensors(directory))


def _files(directory: Path, suffix: str) -> list[Path]:
    indexes = sorted(directory.glob(f"*{suffix}.index.json"))
    if len(indexes) > 1:
        raise ArgumentError(f"{directory}: expected one index, found {', '.join(index.name for index in indexes)}")
    if not indexes:
        files = sorted(directory.glob(f"*{suffix}"))
        return [file for file in files if file.name in MAIN_FILES] or files
    return indexed_files(indexes[0])


def indexed_files(index: Path) -> list[Path]:
    """The files that an index of a sharded checkpoint names; ValueError unless they are beside it."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ArgumentError(f"{index}: expected an entry weight_map of tensor names to file names")
    files = []
    for name in sorted(set(shards.values())):
        if Path(name).name != name or "\0" in name:
            raise ArgumentError(f"{index}: expected file names beside the index, got {shown(name)}")
        if not (index.parent / name).is_file():
            raise ArgumentError(f"{index.parent / name}: missing, though {index.name} names it; download it again")
        files.append(index.parent / name)
    return files


def _merged(files: Iterable[Path], read_file: Callable[[Path], Mapping[str, T]]) -> dict[str, T]:
    merged: dict[str, T] = {}
    for file in files:
        tensors = read_file(file)
        twice = merged.keys() & tensors.keys()
        if twice:
            raise ArgumentError(f"{file}: tensor {min(twice)!r} is in another file of the checkpoint too")
        merged |= tensors
    return merged


def _read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load_file(file)
    except safetensors.SafetensorError as error:
        raise ArgumentError(f"{file}: truncated or no safetensors file ({error})") from error


def _read_torch(file: Path) -> dict[str, torch.Tensor]:
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # a broken pickle can raise anything
        raise ArgumentError(f"{file}: truncated, or holds other things than tensors ({error})") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise ArgumentError(f"{file}: expected a dict of tensors")
    if not all(isinstance(name, str) for name in tensors):
        raise ArgumentError(f"{file}: expected names of tensors, got {shown(next(iter(tensors)))}")
    return tensors


_READERS: dict[str, Callable[[Path], dict[str, torch.Tensor]]] = {
    ".safetensors": _read_safetensors,
    ".bin": _read_torch,
    ".pt": _read_torch,
    ".pth": _read_torch,
}
