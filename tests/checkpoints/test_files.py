import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ipex_quant.checkpoints import load_low_precision_checkpoint, open_checkpoint
from ipex_quant.numerics.affine import dequantize

CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}


@pytest.fixture
def tensors(make_gptq_module):
    parts = {f"{name}.{key}": t for name in "ab" for key, t in make_gptq_module(4, 32, 64, 32).tensors.items()}
    return parts | {"norm.weight": torch.ones(8)}


def _write_config(directory: Path, config: object = None, name: str = "config.json") -> None:
    config = CONFIG if config is None else config
    content = {"model_type": "llama", "quantization_config": config} if name == "config.json" else config
    (directory / name).write_text(json.dumps(content))


def _split(tensors: dict) -> tuple[dict, dict]:
    names = sorted(tensors)
    return {n: tensors[n] for n in names[:4]}, {n: tensors[n] for n in names[4:]}


def _same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("name", ["model.safetensors", "gptq_model-4bit-128g.safetensors"])
def test_safetensors(tmp_path, tensors, name):
    save_file(tensors, tmp_path / name)
    _write_config(tmp_path)
    state_dict, config = load_low_precision_checkpoint(tmp_path)
    assert _same(state_dict, tensors)
    assert config == CONFIG


@pytest.mark.parametrize("name", ["pytorch_model.bin", "gptq_checkpoint_g32.pt", "model.pth"])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files(tmp_path, tensors, name, zipped):
    torch.save(tensors, tmp_path / name, _use_new_zipfile_serialization=zipped)
    _write_config(tmp_path)
    assert _same(load_low_precision_checkpoint(str(tmp_path))[0], tensors)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("indexed", [True, False])
def test_sharded(tmp_path, tensors, suffix, indexed):
    weight_map = {}
    for number, shard in enumerate(_split(tensors)):
        file = f"model-0000{number + 1}-of-00002{suffix}"
        save_file(shard, tmp_path / file) if suffix == ".safetensors" else torch.save(shard, tmp_path / file)
        weight_map |= dict.fromkeys(shard, file)
    if indexed:
        (tmp_path / f"model{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
        torch.save({}, tmp_path / f"training_args{suffix}")  # not named by the index, not read
    _write_config(tmp_path)
    assert _same(load_low_precision_checkpoint(tmp_path)[0], tensors)


def test_what_is_loaded_opens(tmp_path, tensors, make_gptq_module):
    save_file(tensors, tmp_path / "model.safetensors")
    _write_config(tmp_path)
    qw, bias = open_checkpoint(load_low_precision_checkpoint(tmp_path)).quantized_weight("b", 64, 32)
    assert torch.equal(dequantize(qw), make_gptq_module(4, 32, 64, 32).weight)
    assert bias is None


def test_safetensors_come_before_pickles(tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors")
    torch.save({"old": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    _write_config(tmp_path)
    assert _same(load_low_precision_checkpoint(tmp_path)[0], tensors)


def test_where_the_config_is_looked_for(tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors")
    _write_config(tmp_path, CONFIG | {"bits": 8}, "quantize_config.json")
    assert load_low_precision_checkpoint(tmp_path)[1]["bits"] == 8
    _write_config(tmp_path, CONFIG | {"bits": 3}, "quant_config.json")
    assert load_low_precision_checkpoint(tmp_path)[1]["bits"] == 3
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert load_low_precision_checkpoint(tmp_path)[1]["bits"] == 3
    _write_config(tmp_path, CONFIG | {"bits": 2})
    assert load_low_precision_checkpoint(tmp_path)[1]["bits"] == 2


def test_the_name_of_the_file_tells_the_method(tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors")
    _write_config(tmp_path, {"bits": 4, "group_size": 32}, "quantize_config.json")
    assert load_low_precision_checkpoint(tmp_path)[1]["quant_method"] == "gptq"
    _write_config(tmp_path, {"w_bit": 4, "q_group_size": 32}, "quant_config.json")
    assert load_low_precision_checkpoint(tmp_path)[1]["quant_method"] == "awq"


@pytest.mark.parametrize("method", ["foo", "quanto", 3, None])
def test_method_that_is_not_supported(tmp_path, method):
    _write_config(tmp_path, CONFIG | {"quant_method": method})
    with pytest.raises(ValueError, match=rf"quant_method: expected one of \['auto-round', .*\], got {method!r}"):
        load_low_precision_checkpoint(tmp_path)


def test_no_directory_no_config_no_file(tmp_path, tensors):
    with pytest.raises(ValueError, match="expected a checkpoint directory"):
        load_low_precision_checkpoint(tmp_path / "absent")
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    looked_for = r"config\.json with an entry quantization_config, quant_config\.json, quantize_config\.json"
    with pytest.raises(ValueError, match=rf"no quantization configuration; looked for {looked_for}"):
        load_low_precision_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    _write_config(tmp_path)
    with pytest.raises(ValueError, match=r"no checkpoint file; looked for \*\.safetensors, \*\.bin, \*\.pt, \*\.pth"):
        load_low_precision_checkpoint(tmp_path)


def test_a_file_is_no_directory(tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors")
    _write_config(tmp_path)
    with pytest.raises(ValueError, match=r"expected a checkpoint directory, got the file .*model\.safetensors; give"):
        load_low_precision_checkpoint(tmp_path / "model.safetensors")


def test_the_arguments_have_the_names_of_ipex(tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors")
    _write_config(tmp_path)
    state_dict, _ = load_low_precision_checkpoint(pathname=tmp_path, rank=0, world_size=1)
    assert _same(state_dict, tensors)


def test_more_than_one_rank_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"rank: expected one of 0..1, got 2 of 2"):
        load_low_precision_checkpoint(tmp_path, rank=2, world_size=2)


@pytest.mark.parametrize("content", ["not json", "[]", '{"quantization_config": 3}'])
def test_broken_config(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json: (not valid JSON|expected a JSON object)"):
        load_low_precision_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("kept", [0, 4, 300, -10])
def test_truncated_file_is_named(tmp_path, tensors, name, kept):
    save_file(tensors, tmp_path / name) if name.endswith("safetensors") else torch.save(tensors, tmp_path / name)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:kept])
    _write_config(tmp_path)
    with pytest.raises(ValueError, match=rf"{name}: truncated"):
        load_low_precision_checkpoint(tmp_path)


class _Payload:
    def __reduce__(self):
        return (print, ("a pickle ran code",))


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_not_run(tmp_path, capsys, zipped):
    torch.save({"a.qweight": _Payload()}, tmp_path / "model.bin", _use_new_zipfile_serialization=zipped)
    _write_config(tmp_path)
    with pytest.raises(ValueError, match=r"model\.bin: truncated, or holds other things than tensors"):
        load_low_precision_checkpoint(tmp_path)
    assert capsys.readouterr().out == ""


def test_file_of_something_else(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(1)}}, tmp_path / "model.bin")
    _write_config(tmp_path)
    with pytest.raises(ValueError, match=r"model\.bin: expected a dict of tensors"):
        load_low_precision_checkpoint(tmp_path)


def test_bad_index(tmp_path, tensors):
    _write_config(tmp_path)
    save_file(tensors, tmp_path / "model-1.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    for weight_map, message in (
        (None, "expected an entry weight_map"),
        ({"a": 1}, "expected an entry weight_map"),
        ({"a": "../secret.safetensors"}, "expected file names beside the index, got '../secret.safetensors'"),
        (
            {"a": "model-2.safetensors"},
            r"model-2\.safetensors: missing, though model\.safetensors\.index\.json names it",
        ),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ValueError, match=message):
            load_low_precision_checkpoint(tmp_path)
    (tmp_path / "other.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="expected one index, found"):
        load_low_precision_checkpoint(tmp_path)


def test_a_tensor_in_two_files(tmp_path, tensors):
    _write_config(tmp_path)
    save_file(tensors, tmp_path / "one.safetensors")
    save_file({"norm.weight": torch.zeros(8)}, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match=r"two\.safetensors: tensor 'norm\.weight' is in another file"):
        load_low_precision_checkpoint(tmp_path)


def test_names_that_are_no_text_are_refused(tmp_path):
    _write_config(tmp_path, CONFIG)
    torch.save({1: torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: expected names of tensors, got 1"):
        load_low_precision_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["[" * 100000, '{"quantization_config": ' + "[" * 100000])
def test_deeply_nested_configurations_are_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON \(it is nested too deeply"):
        load_low_precision_checkpoint(tmp_path)
