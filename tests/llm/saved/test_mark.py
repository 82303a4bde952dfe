import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
import transformers

import ipex_quant as ipex
from ipex_quant.llm.saved import mark

LOADS = """
import sys, transformers
for load in ({loads}):
    try:
        load(sys.argv[1])
    except ValueError as error:
        print(" ".join(str(error).split()))
assert not any(name.startswith("ipex_quant") for name in sys.modules)
"""


def quantized(model):
    mapping = ipex.quantization.get_weight_only_quant_qconfig_mapping()
    return ipex.llm.optimize(model, dtype=torch.bfloat16, quantization_config=mapping)


def save_with_transformers(model, directory):
    model.save_pretrained(directory)


def config_of(directory):
    return json.loads((directory / "config.json").read_text())


@pytest.mark.parametrize("save", [ipex.llm.save, save_with_transformers])
def test_transformers_alone_says_what_reads_the_model(llama, tmp_path, save):
    save(quantized(llama), tmp_path)
    loads = "transformers.AutoModel.from_pretrained, transformers.AutoModelForCausalLM.from_pretrained, "
    loads += "transformers.LlamaForCausalLM.from_pretrained"
    loads += ", lambda name: transformers.pipeline('text-generation', name)"
    run = subprocess.run(
        [sys.executable, "-c", LOADS.format(loads=loads), tmp_path], capture_output=True, text=True, check=True
    )
    lines = run.stdout.splitlines()
    assert len(lines) == 4
    for line in lines:
        assert mark.TEXT in line
    assert "MISSING" not in run.stderr


@pytest.mark.parametrize("save", [ipex.llm.save, save_with_transformers])
def test_the_mark_is_off_once_the_model_is_read_and_on_when_it_is_saved_again(llama, logits, tmp_path, save):
    save(quantized(llama), tmp_path / "first")
    expected = logits(ipex.llm.load(tmp_path / "first"))
    for load in (ipex.llm.load, transformers.AutoModelForCausalLM.from_pretrained):
        loaded = load(tmp_path / "first")
        assert not hasattr(loaded.config, mark.KEY)
        save(loaded, tmp_path / "second")
        assert config_of(tmp_path / "second")[mark.KEY] == mark.TEXT
        assert torch.equal(logits(load(tmp_path / "second")), expected)


def test_models_from_before_the_mark_load(llama, logits, tmp_path):
    model = quantized(llama)
    ipex.llm.save(model, tmp_path)
    config = config_of(tmp_path)
    del config[mark.KEY]
    (tmp_path / "config.json").write_text(json.dumps(config))
    for load in (ipex.llm.load, transformers.AutoModelForCausalLM.from_pretrained):
        assert torch.equal(logits(load(tmp_path)), logits(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_mark_what_they_save(llama, tmp_path, copied):
    copied(quantized(llama)).save_pretrained(tmp_path)
    assert config_of(tmp_path)[mark.KEY] == mark.TEXT


def test_a_float_model_again_has_no_mark(llama, tmp_path):
    quantized(llama).dequantize().save_pretrained(tmp_path)
    assert mark.KEY not in config_of(tmp_path)


def test_other_processes_write_nothing(llama, tmp_path):
    quantized(llama).save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "config.json").exists()


def test_a_file_of_weights_stays_named(llama):
    llama.config.transformers_weights = "other.safetensors"
    mark.unmark(llama.config)
    assert llama.config.transformers_weights == "other.safetensors"
