import struct

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from ipex_quant.conversion.calibration_imatrix import layer_importances, read_imatrix

NAMES = ["blk.0.attn_q.weight", "blk.1.ffn_down.weight"]
MEANS = [torch.tensor([0.5, 2.0, 0.0, 1.0]), torch.tensor([3.0, 0.25])]


def write_binary(path, names=NAMES, means=MEANS, calls=6, entries=None, tail=b""):
    """The older form, as llama.cpp wrote it: means times calls, then the calls of the last dataset and its name."""
    parts = [struct.pack("<i", len(names) if entries is None else entries)]
    for name, values in zip(names, means, strict=True):
        parts.append(struct.pack("<i", len(name)) + name.encode())
        parts.append(struct.pack("<ii", calls, len(values)) + (values * calls).numpy().astype("<f4").tobytes())
    path.write_bytes(b"".join(parts) + tail)
    return path


def write_gguf(path, kind="imatrix", counts=(5.0, 4.0), suffix=".counts"):
    """The form in a GGUF container, as llama.cpp writes it."""

    def text(value):
        return struct.pack("<Q", len(value)) + value.encode()

    infos, data = b"", b""
    for name, values, count in zip(NAMES, MEANS, counts, strict=True):
        for key, numbers in ((".in_sum2", values * count), (suffix, torch.tensor([count]))):
            infos += text(name + key) + struct.pack("<IQQIQ", 2, len(numbers), 1, 0, len(data))
            content = numbers.numpy().astype("<f4").tobytes()
            data += content + bytes(-len(content) % 32)
    header = (
        b"GGUF" + struct.pack("<IQQ", 3, 2 * len(NAMES), 1) + text("general.type") + struct.pack("<I", 8) + text(kind)
    )
    header += infos
    path.write_bytes(header + bytes(-len(header) % 32) + data)
    return path


@pytest.mark.parametrize("write", [write_binary, write_gguf])
def test_means_of_squares_are_read(write, tmp_path):
    found = read_imatrix(write(tmp_path / "imatrix.x"))
    assert list(found) == NAMES
    for name, expected in zip(NAMES, MEANS, strict=True):
        assert torch.allclose(found[name], expected[None])


def test_what_follows_the_entries_is_no_matter(tmp_path):
    tail = struct.pack("<ii", 6, 4) + b"text"
    assert list(read_imatrix(write_binary(tmp_path / "a.dat", tail=tail))) == NAMES


def test_what_was_never_seen_is_zero(tmp_path):
    found = read_imatrix(write_gguf(tmp_path / "a.gguf", counts=(0.0, 4.0)))
    assert found[NAMES[0]].eq(0).all()
    assert all(each.eq(0).all() for each in read_imatrix(write_binary(tmp_path / "a.dat", calls=0)).values())


def test_damaged_files_are_refused(tmp_path):
    good = write_binary(tmp_path / "good.dat").read_bytes()
    for size in range(len(good)):
        (tmp_path / "cut.dat").write_bytes(good[:size])
        with pytest.raises(ValueError, match=r"cut\.dat"):
            read_imatrix(tmp_path / "cut.dat")
    for name, content in {
        "many": struct.pack("<i", 1 << 30),
        "negative": struct.pack("<i", -1),
        "long name": struct.pack("<ii", 1, 1 << 30) + bytes(100),
        "many values": struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 1, 1 << 30) + bytes(100),
        "none": struct.pack("<i", 0),
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="expected an importance matrix"):
            read_imatrix(tmp_path / name)
    with pytest.raises(ValueError, match="finite and not negative"):
        read_imatrix(write_binary(tmp_path / "nan.dat", means=[torch.tensor([torch.nan]), MEANS[1]]))
    with pytest.raises(ValueError, match="expected values, once"):
        read_imatrix(write_binary(tmp_path / "twice.dat", names=[NAMES[0]] * 2))
    with pytest.raises(ValueError, match=r"general\.type imatrix, got 'model'"):
        read_imatrix(write_gguf(tmp_path / "model.gguf", kind="model"))
    with pytest.raises(ValueError, match=r"expected floats \.in_sum2 and \.counts"):
        read_imatrix(write_gguf(tmp_path / "no_counts.gguf", suffix=".number"))


@pytest.fixture
def llama():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2, vocab_size=40)).eval()


def test_weights_of_the_file_are_layers_of_the_model(llama):
    means = {"blk.0.attn_q.weight": torch.rand(1, 32), "blk.1.ffn_down.weight": torch.rand(1, 64)}
    others = {"output.weight": torch.rand(1, 32), "blk.0.ffn_gate_exps.weight": torch.rand(4, 32)}
    found = layer_importances(means | others, llama)
    assert found.keys() == {"model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "lm_head"}
    assert torch.equal(found["model.layers.1.mlp.down_proj"], means["blk.1.ffn_down.weight"][0])
    with pytest.raises(ValueError, match="q_proj: expected 32 input features, got 16; it is of another model"):
        layer_importances({"blk.0.attn_q.weight": torch.rand(1, 16)}, llama)
    with pytest.raises(ValueError, match="none of its weights"):
        layer_importances(means, nn.Sequential(nn.Linear(4, 4)))
