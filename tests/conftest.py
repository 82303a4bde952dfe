"""A writer of GGUF files, apart from the package's reader."""

import struct

import pytest
import torch

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
BLOCKS = {
    "Q4_0": (2, 32, 18),
    "Q4_1": (3, 32, 20),
    "Q8_0": (8, 32, 34),
    "MXFP4": (39, 32, 17),
    "Q4_K": (12, 256, 144),
    "Q6_K": (14, 256, 210),
}


def _text(text):
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value):
    """Type and bytes of a value of metadata."""
    if isinstance(value, bool):
        return 7, struct.pack("<?", value)
    if isinstance(value, int):
        return (4, struct.pack("<I", value)) if 0 <= value < 1 << 32 else (11, struct.pack("<q", value))
    if isinstance(value, float):
        return 6, struct.pack("<f", value)
    if isinstance(value, str):
        return 8, _text(value)
    kinds, parts = zip(*map(_value, value), strict=True) if value else ((4,), ())
    return 9, struct.pack("<IQ", kinds[0], len(value)) + b"".join(parts)


def write(path, metadata, tensors, version=3, alignment=32):
    """Write `tensors`: floats, or pairs of the type of blocks and uint8 ``[..., bytes of a row]``."""
    infos, data = [], b""
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            number, elements, size = BLOCKS[tensor[0]]
            raw = tensor[1]
            shape = [*raw.shape[:-1], raw.shape[-1] // size * elements]
        else:
            number, shape, raw = TYPES[tensor.dtype], list(tensor.shape), tensor.contiguous().view(torch.uint8)
        infos.append((name, shape, number, len(data)))
        data += raw.contiguous().numpy().tobytes()
        data += bytes(-len(data) % alignment)
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, value in metadata.items():
        kind, content = _value(value)
        header += _text(key) + struct.pack("<I", kind) + content
    for name, shape, number, offset in infos:
        header += _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], number, offset)
    path.write_bytes(header + bytes(-len(header) % alignment) + data)
    return path


def q8_0(weight):
    """Blocks of Q8_0 of a weight ``[..., K]``, and the values they stand for."""
    blocks = weight.float().reshape(-1, 32)
    scales = (blocks.abs().amax(1, keepdim=True) / 127).half()
    codes = (blocks / scales.float()).round().nan_to_num().clamp(-127, 127).to(torch.int8)
    raw = torch.cat((scales.view(torch.uint8), codes.view(torch.uint8)), dim=1)
    rows = weight.shape[:-1]
    return ("Q8_0", raw.reshape(*rows, -1)), (codes.float() * scales.float()).reshape(weight.shape)


@pytest.fixture
def write_gguf():
    """`write_gguf(path, metadata, tensors)` writes a GGUF file and returns its path."""
    return write


@pytest.fixture
def blocks_of():
    """`blocks_of(weight)` gives blocks of Q8_0 and their values."""
    return q8_0
