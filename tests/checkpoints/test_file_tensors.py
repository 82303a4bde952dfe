import json

import pytest
import torch
from safetensors.torch import save_file

from ipex_quant.checkpoints.file_tensors import file_tensors

TENSORS = {
    "a": torch.arange(24, dtype=torch.int32).view(2, 3, 4),
    "b": torch.randn(5, 3).bfloat16(),
    "c": torch.tensor(3.5),
    "d": torch.zeros(0, 4),
    "e": torch.randn(4, 4).to(torch.float8_e4m3fn),
    "f": torch.tensor([120, 127], dtype=torch.uint8).view(torch.float8_e8m0fnu),
    "g": torch.tensor([True, False]),
}


@pytest.fixture
def path(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path / "model.safetensors"


def test_tensors_are_read_when_they_are_indexed(path):
    found = file_tensors(path)
    assert found.keys() == TENSORS.keys()
    for name, expected in TENSORS.items():
        stored = found[name]
        assert (stored.dtype, stored.shape, stored.dim()) == (expected.dtype, expected.shape, expected.dim())
        assert torch.equal(
            stored[...].view(torch.uint8) if expected.dim() else stored[...],
            expected.view(torch.uint8) if expected.dim() else expected,
        )
    assert torch.equal(found["a"][1], TENSORS["a"][1])
    with pytest.raises(IndexError, match="expected an index below 2, got 2"):
        found["a"][2]


def test_a_file_that_gets_shorter_is_told(path):
    found = file_tensors(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="it has become shorter"):
        [each[...] for each in found.values()]
    with pytest.raises(ValueError, match="truncated or damaged"):
        file_tensors(path)


def write(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "size", "message"),
    [
        (b"no json", 0, "no JSON"),
        (b"[1]", 0, "its header is a list"),
        (b"\xff\xfe", 0, "no JSON"),
        (b"[" * 100_000, 0, "nested too deeply"),
        ({"x": 3}, 0, "x: expected an object, got 3"),
        ({"x": entry("F4")}, 8, "x: dtype: expected one of"),
        ({"x": entry(dtype=[])}, 8, "x: dtype: expected one of"),
        ({"x": entry(shape=[-2])}, 8, r"x: expected sizes, got shape \[-2\]"),
        ({"x": entry(shape=[True])}, 8, "x: expected sizes"),
        ({"x": entry(shape=[2**40, 2**40])}, 8, r"x: F32 .* takes \d+ bytes, its data_offsets are \[0, 8\]"),
        ({"x": entry(offsets=[8, 0])}, 8, "x: F32 .* takes 8 bytes"),
        ({"x": entry(offsets=[0])}, 8, "x: expected sizes"),
        ({"x": entry(), "y": entry()}, 8, "y: expected to begin at byte 8, got 0"),
        ({"x": entry(offsets=[4, 12])}, 12, "x: expected to begin at byte 0, got 4"),
        ({"x": entry()}, 4, "truncated or damaged: its header tells of 8 bytes, it has 4"),
        ({"x": entry()}, 12, "truncated or damaged"),
    ],
)
def test_bad_headers_are_refused(tmp_path, header, size, message):
    write(tmp_path / "x.safetensors", header, bytes(size))
    with pytest.raises(ValueError, match=message):
        file_tensors(tmp_path / "x.safetensors")


@pytest.mark.parametrize("content", [b"", b"1234567", (2**63).to_bytes(8, "little") + b"{}", b"\x10" + bytes(9)])
def test_files_too_short_for_their_header_are_refused(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="truncated or no safetensors file"):
        file_tensors(tmp_path / "x.safetensors")
