"""The container GGUF: what is in a file, and everything that may be wrong with one."""

import contextlib
import struct

import pytest
import torch

from ipex_quant.checkpoints.gguf_file import find_gguf, open_gguf

METADATA = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.rope.freq_base": 10000.0,
    "flag": True,
    "tokenizer.ggml.tokens": ["a", "b\u00e9", ""],
    "numbers": [1, 2, 3],
    "nested": [[1], [2, 3]],
}


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(3, 5, generator=generator),
        "b.weight": torch.randn(7, generator=generator).half(),
        "c.weight": torch.randn(2, 3, 4, generator=generator).bfloat16(),
        "d.weight": ("Q8_0", torch.randint(0, 256, (3, 68), generator=generator, dtype=torch.uint8)),
    }


@pytest.fixture
def path(tmp_path, write_gguf):
    return write_gguf(tmp_path / "model.gguf", METADATA, tensors())


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [None, 8, 64])
def test_what_was_written_is_read(tmp_path, write_gguf, version, alignment):
    metadata = METADATA | ({} if alignment is None else {"general.alignment": alignment})
    file = open_gguf(write_gguf(tmp_path / "m.gguf", metadata, tensors(), version, alignment or 32))
    assert file.metadata == metadata
    assert file.architecture == "llama"
    for name, tensor in tensors().items():
        kind, expected = tensor if isinstance(tensor, tuple) else ("", tensor)
        assert file.tensors[name].kind == kind
        assert torch.equal(file.tensors[name].stored[...], expected)


def test_no_byte_less_is_accepted(path):
    data = path.read_bytes()
    for length in (*range(0, 700, 3), len(data) - 33):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"truncated|expected a GGUF file"):
            open_gguf(path)


def test_no_changed_byte_of_the_header_crashes(path):
    data = path.read_bytes()
    generator = torch.Generator().manual_seed(1)
    for at in range(4, 620):
        changed = bytearray(data)
        changed[at] = int(torch.randint(0, 256, (1,), generator=generator))
        path.write_bytes(changed)
        with contextlib.suppress(ValueError):
            for tensor in open_gguf(path).tensors.values():
                tensor.stored[...]


def at_header(data, at, form, value):
    return data[:at] + struct.pack(form, value) + data[at + struct.calcsize(form) :]


@pytest.mark.parametrize(
    ("at", "form", "value", "message"),
    [
        (4, "<I", 1, "expected GGUF version 2 or 3, got 1"),
        (4, ">I", 3, "big-endian"),
        (8, "<Q", 1 << 60, "tensors do not fit"),
        (16, "<Q", 1 << 60, "entries of metadata do not fit"),
        (24, "<Q", 1 << 62, "expected a text of at most 65536 bytes"),
    ],
)
def test_counts_are_compared_with_the_file(path, at, form, value, message):
    path.write_bytes(at_header(path.read_bytes(), at, form, value))
    with pytest.raises(ValueError, match=message):
        open_gguf(path)


def info_at(data, name):
    """Where the number of dimensions of the tensor `name` is."""
    return data.index(name) + len(name)


@pytest.mark.parametrize(
    ("offset", "form", "value", "message"),
    [
        (0, "<I", 0, "expected 1 to 4 dimensions, got 0"),
        (0, "<I", 1 << 30, "expected 1 to 4 dimensions"),
        (4, "<Q", 0, "expected sizes above 0"),
        (4, "<Q", 1 << 61, "larger than any file"),
        (4, "<Q", 1 << 40, "end beyond the file"),
        (20, "<I", 99, "got 99; quantize the model"),
        (20, "<I", 16, "got IQ2_XXS; quantize the model"),
        (20, "<I", 8, "Q8_0 needs rows of whole blocks of 32"),
        (24, "<Q", 1 << 63, "end beyond the file"),
        (24, "<Q", 4, "are not aligned to 32"),
        (24, "<Q", 64, "overlap"),
    ],
)
def test_tensors_lie_in_the_file_apart(path, offset, form, value, message):
    data = path.read_bytes()
    path.write_bytes(at_header(data, info_at(data, b"a.weight") + offset, form, value))
    with pytest.raises(ValueError, match=message):
        open_gguf(path)


def test_names_are_unique(path):
    data = path.read_bytes()
    path.write_bytes(data.replace(b"b.weight", b"a.weight"))
    with pytest.raises(ValueError, match=r"two tensors are called 'a\.weight'"):
        open_gguf(path)


def test_keys_are_unique(tmp_path, write_gguf):
    path = write_gguf(tmp_path / "m.gguf", METADATA | {"flog": True}, {})
    path.write_bytes(path.read_bytes().replace(b"flog", b"flag"))
    with pytest.raises(ValueError, match="'flag' is in the metadata twice"):
        open_gguf(path)


@pytest.mark.parametrize("alignment", [0, 4, 12, 1 << 24, "x"])
def test_alignments_are_checked(tmp_path, write_gguf, alignment):
    path = write_gguf(tmp_path / "m.gguf", METADATA | {"general.alignment": alignment}, {})
    with pytest.raises(ValueError, match=r"general\.alignment: expected a multiple of 8"):
        open_gguf(path)


def test_arrays_are_not_nested_without_end(tmp_path, write_gguf):
    path = write_gguf(tmp_path / "m.gguf", METADATA | {"deep": [[[[[[1]]]]]]}, {})
    with pytest.raises(ValueError, match="nested more than 4 deep"):
        open_gguf(path)


def parts(directory, write_gguf, **changes):
    names = list(tensors())
    for number in range(2):
        own = {name: tensors()[name] for name in names[2 * number : 2 * number + 2]}
        split = {"split.no": number, "split.count": 2, "split.tensors.count": 4} | changes
        write_gguf(directory / f"m-{number + 1:05d}-of-00002.gguf", (METADATA if number == 0 else {}) | split, own)


def test_parts_are_read_together(tmp_path, write_gguf):
    parts(tmp_path, write_gguf)
    for number in (1, 2):
        file = open_gguf(tmp_path / f"m-{number:05d}-of-00002.gguf")
        assert file.tensors.keys() == tensors().keys()
        assert file.architecture == "llama"
    assert find_gguf(tmp_path) == tmp_path / "m-00001-of-00002.gguf"
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(ValueError, match=r"the parts \['m-00002-of-00002\.gguf'\] are missing"):
        open_gguf(tmp_path / "m-00001-of-00002.gguf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split.no": 0}, r"expected split\.no 1 and split\.count 2, got \[0, 2\]"),
        ({"split.count": 3}, r"split\.count 2, got \[0, 3\]"),
        ({"split.tensors.count": 5}, "expected 5 tensors in all parts, found 4"),
        ({"split.count": "x"}, r"split\.count: expected a int, got 'x'"),
    ],
)
def test_parts_must_belong_together(tmp_path, write_gguf, changes, message):
    parts(tmp_path, write_gguf, **changes)
    with pytest.raises(ValueError, match=message):
        open_gguf(tmp_path / "m-00001-of-00002.gguf")


def test_which_file_of_a_directory(path, tmp_path):
    assert find_gguf(path) == path
    assert find_gguf(tmp_path) == path
    (tmp_path / "mmproj-model.gguf").write_bytes(b"")
    assert find_gguf(tmp_path) == path
    (tmp_path / "other.gguf").write_bytes(b"")
    with pytest.raises(ValueError, match=r"it holds 2 models; give one of model\.gguf, other\.gguf"):
        find_gguf(tmp_path)
    (tmp_path / "other.gguf").unlink()
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert find_gguf(tmp_path) == path
    (tmp_path / "config.json").write_text("{}")
    assert find_gguf(tmp_path) is None
    assert find_gguf(tmp_path / "none") is None
