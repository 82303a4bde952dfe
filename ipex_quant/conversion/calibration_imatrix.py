"""`read_imatrix`: importance matrices of llama.cpp as mean squares of the inputs of linear layers.

Source: llama.cpp's ``tools/imatrix``. The GGUF form has, for the weight NAME of a GGUF model, a tensor
``NAME.in_sum2`` with sums of squares ``[matrices, K]`` and ``NAME.counts`` with their number ``[matrices, 1]``. The
older binary form has an int32 number of entries, and of each the int32 length of its name, the name, the int32 numbers
of calls and of values, and the values, float32: means of squares times the number of calls. What follows is no part of
the statistics.

Files come from strangers: every count is compared with what is left of the file before anything of that size is read.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import nn

from ..checkpoints import GgufFile, open_gguf
from ..checkpoints.gguf_file import MAGIC, MAX_NAME
from ..checkpoints.gguf_names import ARCHITECTURES, place_of
from ..nn.linears import is_linear, linear_shape
from ..reading import shown

_SUMS, _COUNTS = ".in_sum2", ".counts"


def read_imatrix(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Mean squares of the inputs, float32 ``[matrices, K]``, by the name of the weight in a GGUF model.

    There are several matrices where experts are one weight. Inputs that were never seen have zeros. Raises OSError for
    a file that cannot be read, and ValueError, with the file named, for anything that does not fit.
    """
    path = Path(path)
    with path.open("rb") as file:
        is_gguf = file.read(len(MAGIC)) == MAGIC
        file.seek(0)
        found = {} if is_gguf else _binary(path, file, os.fstat(file.fileno()).st_size)
    if is_gguf:
        found = _of_gguf(open_gguf(path))
    if not found:
        raise ValueError(f"{path}: expected an importance matrix of llama.cpp, it has no entries")
    for name, means in found.items():
        if not (means.isfinite().all() and (means >= 0).all()):
            raise ValueError(f"{path}: {shown(name)}: expected mean squares that are finite and not negative")
    return found


def layer_importances(means: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """The mean squares ``[K]`` of the linear layers of `model`, by name, from the result of `read_imatrix`.

    Raises ValueError if none of the file's weights is a layer of `model`, and for another number of input features.
    """
    layers = {name: linear_shape(module)[1] for name, module in model.named_modules() if is_linear(module)}
    best: dict[str, torch.Tensor] = {}
    for architecture in ARCHITECTURES.values():
        places = {name: place_of(architecture, name) for name in means}
        found = {p.module: means[name] for name, p in places.items() if p is not None and p.columns is None}
        found = {name: each[0] for name, each in found.items() if name in layers and len(each) == 1}
        best = max(best, found, key=len)
    if not best:
        raise ValueError(
            f"imatrix: none of its weights ({shown(min(means))}, ...) is a linear layer of a {type(model).__name__}"
        )
    for name, each in best.items():
        if len(each) != layers[name]:
            raise ValueError(
                f"imatrix: {name}: expected {layers[name]} input features, got {len(each)}; it is of another model"
            )
    return best


def _of_gguf(file: GgufFile) -> dict[str, torch.Tensor]:
    kind = file.expect("general.type", str, "")
    if kind != "imatrix":
        raise ValueError(f"{file.path}: expected general.type imatrix, got {shown(kind)}")
    found = {}
    for name, tensor in file.tensors.items():
        if not name.endswith(_SUMS):
            continue
        weight = name.removesuffix(_SUMS)
        counts = file.tensors.get(weight + _COUNTS)
        if counts is None or tensor.kind or counts.kind:
            raise ValueError(f"{file.path}: {shown(weight)}: expected floats {_SUMS} and {_COUNTS}")
        sums, number = tensor.stored[...].float(), counts.stored[...].float()
        sums = sums.reshape(-1, sums.shape[-1])
        if number.numel() != len(sums):
            raise ValueError(f"{file.path}: {shown(weight)}: expected {len(sums)} counts, got {number.numel()}")
        number = number.reshape(-1, 1)
        found[weight] = torch.where(number > 0, sums / number.clamp(min=1), 0.0)
    return found


def _binary(path: Path, file: BinaryIO, size: int) -> dict[str, torch.Tensor]:
    def number(what: str, most: int) -> int:
        data = file.read(4)
        if len(data) < 4:
            raise ValueError(f"{path}: expected an importance matrix of llama.cpp, it ends before its {what}")
        (value,) = struct.unpack("<i", data)
        if not 0 <= value <= most:
            raise ValueError(f"{path}: expected an importance matrix of llama.cpp, got {value} {what}")
        return value

    found: dict[str, torch.Tensor] = {}
    for _ in range(number("entries", size // 12)):
        name = file.read(number("bytes of a name", min(MAX_NAME, size - file.tell()))).decode("utf-8", "replace")
        calls = number("calls", 1 << 30)
        count = number("values", max(size - file.tell() - 4, 0) // 4)
        values = torch.from_numpy(np.frombuffer(file.read(4 * count), dtype="<f4").copy())
        if not count or name in found:
            raise ValueError(f"{path}: {shown(name)}: expected values, once")
        found[name] = (values / max(calls, 1)).unsqueeze(0)
    return found
