"""The container GGUF, versions 2 and 3, little endian: metadata, and where in its file each tensor lies.

A file is the magic ``GGUF``, a uint32 version, the uint64 counts of tensors and of metadata, and then

- metadata: a name, a uint32 type and a value each. Strings are a uint64 length and UTF-8, arrays a uint32 type, a
  uint64 count and the values;
- tensors: a name, a uint32 number of dimensions, their uint64 sizes with the fastest first, a uint32 type, and a uint64
  offset into the data, a multiple of ``general.alignment``;
- the data, from the next multiple of the alignment on.

A model may be cut into files ``NAME-00001-of-00003.gguf``. Source: ggml's ``docs/gguf.md``.

Files come from strangers: every count and length is compared with what is left of the file before anything of that
size is read, and tensors with the file before any of them is.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from ..reading import shown
from .file_tensors import FileTensor
from .gguf_blocks import BLOCKS

MAGIC = b"GGUF"
VERSIONS = (2, 3)

FLOATS = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
"""dtypes of tensors that are no blocks, by their number in files."""

ALIGNMENT = 32
"""Alignment of the data where ``general.alignment`` is not given."""

MAX_NAME = 1 << 16
"""Most bytes of a name."""

MAX_DIMENSIONS = 4
MAX_NESTING = 4
"""Deepest arrays of arrays."""

MAX_PARTS = 1000
"""Most files of one model."""

_NUMBERS = {
    **{0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?"},
    **{10: "<u8", 11: "<i8", 12: "<f8"},
}
_STRING, _ARRAY = 8, 9
_PART = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")

_OTHER_TYPES = {
    **{16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S", 24: "I8", 25: "I16"},
    **{9: "Q8_1", 15: "Q8_K", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 40: "NVFP4"},
}
"""Types that files may have and this package does not read, for messages."""


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a file: `kind` is the name of its blocks' type, or "" for floats.

    `stored` holds floats of the tensor's shape, or uint8 with the bytes of a row in place of its elements.
    """

    kind: str
    stored: FileTensor


@dataclass(frozen=True)
class GgufFile:
    """Metadata and tensors, by name, of a model in one file or several; `path` is the first."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """``general.architecture``; ValueError if it is no string."""
        return self.expect("general.architecture", str)

    def expect(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of `key`, which must be a `kind`, or `default` if there is none; else ValueError.

        A float must be finite.
        """
        value = self.metadata.get(key, default)
        number = kind is float and isinstance(value, int) and not isinstance(value, bool)
        if not (isinstance(value, kind) or number) or (kind is int and isinstance(value, bool)):
            raise ValueError(f"{self.path}: {key}: expected a {kind.__name__}, got {shown(value)}")
        if kind is float and not math.isfinite(value):
            raise ValueError(f"{self.path}: {key}: expected a finite number, got {value}")
        return float(value) if number else value

    def of_model(self, key: str, kind: type = int, default: Any = None) -> Any:
        """`expect` of a key of the architecture, such as ``attention.head_count``."""
        return self.expect(f"{self.architecture}.{key}", kind, default)

    def head_size(self) -> int:
        """The size of a head of keys, also where layers differ in their heads; ValueError for what is no number."""
        heads = self.metadata.get(f"{self.architecture}.attention.head_count", 1)
        most = max((each for each in heads if type(each) is int), default=1) if isinstance(heads, list) else heads
        if type(most) is not int:
            raise ValueError(f"{self.path}: attention.head_count: expected a number, got {shown(heads)}")
        return self.of_model("attention.key_length", int, self.of_model("embedding_length") // max(most, 1))


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that `path` is or, as a directory without another model, holds; None if there is none.

    Another model is a config.json with weights in safetensors or .bin files. Of a model in several files it is the
    first. Raises ValueError for a directory with several models.
    """
    if path.suffix == ".gguf" and path.is_file():
        return path
    if not path.is_dir():
        return None
    weights = any(any(path.glob(f"*{suffix}")) for suffix in (".safetensors", ".bin"))
    if weights and (path / "config.json").is_file():
        return None
    files = sorted(each for each in path.glob("*.gguf") if each.is_file())
    models = [each for each in files if not each.name.startswith("mmproj")]  # parts of a model that see images
    first = [each for each in models if (part := _PART.match(each.name)) is None or int(part["number"]) == 1]
    if len(first) > 1:
        raise ValueError(f"{path}: it holds {len(first)} models; give one of {', '.join(each.name for each in first)}")
    return next(iter(first or models), None)


def open_gguf(path: str | os.PathLike) -> GgufFile:
    """The metadata and tensors of a file, and of those that it was cut from together with it.

    Raises ValueError, with the file named, for anything that does not fit: a header that goes beyond the file, tensors
    that overlap or lie outside, types that are not read, parts that are missing or of another model.
    """
    first = Path(path)
    part = _PART.match(first.name)
    if part is None or int(part["count"]) <= 1:
        return _read(first)
    count = int(part["count"])
    if count > MAX_PARTS:
        raise ValueError(f"{first}: expected at most {MAX_PARTS} parts, its name says {count}")
    paths = [first.with_name(f"{part['stem']}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
    missing = [each.name for each in paths if not each.is_file()]
    if missing:
        raise ValueError(f"{first}: the parts {shown(missing)} are missing beside it; download them, too")
    return _together([_read(each) for each in paths])


def _together(parts: list[GgufFile]) -> GgufFile:
    tensors: dict[str, GgufTensor] = {}
    for number, part in enumerate(parts):
        stated = [part.expect(f"split.{key}", int, default) for key, default in (("no", -1), ("count", -1))]
        if stated != [number, len(parts)]:
            raise ValueError(f"{part.path}: expected split.no {number} and split.count {len(parts)}, got {stated}")
        twice = tensors.keys() & part.tensors.keys()
        if twice:
            raise ValueError(f"{part.path}: {shown(min(twice))} is in another part, too")
        tensors |= part.tensors
    total = parts[0].expect("split.tensors.count", int, len(tensors))
    if total != len(tensors):
        raise ValueError(f"{parts[0].path}: expected {total} tensors in all parts, found {len(tensors)}")
    return GgufFile(parts[0].path, parts[0].metadata, tensors)


def _read(path: Path) -> GgufFile:
    with path.open("rb") as file:
        header = _Header(path, file, os.fstat(file.fileno()).st_size)
        if header.take(4) != MAGIC:
            raise ValueError(f"{path}: expected a GGUF file, which begins with {MAGIC.decode()}")
        version = header.number("<u4")
        if version not in VERSIONS:
            hint = "; it is big-endian: convert it" if version.to_bytes(4, "big")[0] in VERSIONS else ""
            raise ValueError(f"{path}: expected GGUF version 2 or 3, got {version}{hint}")
        tensors, entries = header.number("<u8"), header.number("<u8")
        header.check_count(tensors, 24, "tensors")
        header.check_count(entries, 13, "entries of metadata")
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = header.name()
            if key in metadata:
                raise ValueError(f"{path}: {shown(key)} is in the metadata twice")
            metadata[key] = header.value(header.number("<u4"), MAX_NESTING)
        infos = [header.tensor() for _ in range(tensors)]
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment % 8:
        raise ValueError(f"{path}: general.alignment: expected a multiple of 8, got {shown(alignment)}")
    start = -(-header.at // alignment) * alignment
    return GgufFile(path, metadata, _placed(path, infos, start, header.size, alignment))


def _placed(
    path: Path, infos: Iterable[tuple[str, tuple[int, ...], int, int]], start: int, size: int, alignment: int
) -> dict[str, GgufTensor]:
    """The tensors of a file whose data begin at `start`; ValueError for those that lie outside or overlap."""
    tensors: dict[str, GgufTensor] = {}
    spans = []
    for name, shape, number, offset in infos:
        if name in tensors:
            raise ValueError(f"{path}: two tensors are called {shown(name)}")
        kind, dtype, stored = _storage(path, name, shape, number)
        length = math.prod(stored) * dtype.itemsize
        if offset % alignment or start + offset + length > size:
            raise ValueError(
                f"{path}: {shown(name)}: {length} bytes at {offset} of the data are not aligned to {alignment} or end "
                f"beyond the file of {size} bytes: truncated or damaged; download it again"
            )
        spans.append((offset, offset + length, name))
        tensors[name] = GgufTensor(kind, FileTensor(path, dtype, torch.Size(stored), start + offset))
    spans.sort()
    for (_, end, name), (begin, _, other) in itertools.pairwise(spans):
        if begin < end:
            raise ValueError(f"{path}: the tensors {shown(name)} and {shown(other)} overlap")
    return tensors


def _storage(path: Path, name: str, shape: tuple[int, ...], number: int) -> tuple[str, torch.dtype, tuple[int, ...]]:
    """Kind, dtype and shape of what is stored for a tensor of `shape` and the type `number`."""
    if number in FLOATS:
        return "", FLOATS[number], shape
    found = next((kind for kind, blocks in BLOCKS.items() if blocks.number == number), None)
    if found is None:
        kinds = [*BLOCKS, "F32", "F16", "BF16"]
        raise ValueError(
            f"{path}: {shown(name)}: expected one of the types {', '.join(kinds)}, got "
            f"{_OTHER_TYPES.get(number, number)}; quantize the model as Q4_K_M or IQ4_XS instead"
        )
    blocks = BLOCKS[found]
    if not shape or shape[-1] % blocks.elements:
        raise ValueError(f"{path}: {shown(name)}: {found} needs rows of whole blocks of {blocks.elements}, got {shape}")
    return found, torch.uint8, (*shape[:-1], shape[-1] // blocks.elements * blocks.size)


@dataclass
class _Header:
    """Reads the values at `at` of a `file` of `size` bytes; ValueError for one that ends beyond it."""

    path: Path
    file: BinaryIO
    size: int
    at: int = 0

    def take(self, count: int) -> bytes:
        if count > self.size - self.at:
            raise ValueError(
                f"{self.path}: truncated or damaged: {count} bytes are expected at {self.at}, of a file of {self.size}"
            )
        data = self.file.read(count)
        if len(data) != count:
            raise ValueError(f"{self.path}: it has become shorter; download it again")
        self.at += count
        return data

    def check_count(self, count: int, least: int, what: str) -> None:
        """ValueError if `count` things of at least `least` bytes each do not fit into the rest of the file."""
        if count * least > self.size - self.at:
            raise ValueError(f"{self.path}: truncated or damaged: {count} {what} do not fit {self.size} bytes")

    def number(self, form: str) -> int:
        return int.from_bytes(self.take(np.dtype(form).itemsize), "little")

    def string(self, most: int) -> str:
        length = self.number("<u8")
        if length > most:
            raise ValueError(f"{self.path}: expected a text of at most {most} bytes at {self.at}, got {length}")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: a text at {self.at} is no UTF-8 ({error})") from error

    def name(self) -> str:
        return self.string(MAX_NAME)

    def value(self, kind: int, nesting: int) -> Any:
        """A value of metadata: a bool, int, float, str, or list of one of these."""
        if kind in _NUMBERS:
            return self._numbers(kind, 1)[0]
        if kind == _STRING:
            return self.string(self.size)
        if kind != _ARRAY:
            raise ValueError(f"{self.path}: expected a type of metadata below 13 at {self.at}, got {kind}")
        if not nesting:
            raise ValueError(f"{self.path}: arrays in the metadata are nested more than {MAX_NESTING} deep")
        inner, count = self.number("<u4"), self.number("<u8")
        if inner in _NUMBERS:
            return self._numbers(inner, count)
        self.check_count(count, 8, "texts or arrays")
        return [self.value(inner, nesting - 1) for _ in range(count)]

    def _numbers(self, kind: int, count: int) -> list[Any]:
        form = np.dtype(_NUMBERS[kind])
        values: list[Any] = np.frombuffer(self.take(count * form.itemsize), form).tolist()
        return values

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape with the rows first, type and offset of a tensor."""
        name, dimensions = self.name(), self.number("<u4")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise ValueError(f"{self.path}: {shown(name)}: expected 1 to {MAX_DIMENSIONS} dimensions, got {dimensions}")
        shape = tuple(self.number("<u8") for _ in range(dimensions))[::-1]
        if 0 in shape:
            raise ValueError(f"{self.path}: {shown(name)}: expected sizes above 0, got {list(shape)}")
        if math.prod(shape) >= 1 << 62:
            raise ValueError(f"{self.path}: {shown(name)}: a shape of {list(shape)} is larger than any file")
        return name, shape, self.number("<u4"), self.number("<u8")
