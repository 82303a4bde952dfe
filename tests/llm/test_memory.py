"""Memory of `llm.optimize` and `llm.load`, measured in a process of its own."""

import re
import subprocess
import sys

import pytest

SCRIPT = """
import gc, re, sys
import torch, transformers
import ipex_quant as ipex
from ipex_quant.quantization import WoqWeightDtype, get_weight_only_quant_qconfig_mapping

MAPPING = get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT4, group_size=128)

def build(hidden, layers):
    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers, num_attention_heads=8,
        vocab_size=4096,
    )
    with torch.device("meta"):  # the library's own initialization takes seconds
        model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.to_empty(device="cpu").parameters():
        parameter.data.uniform_(-1, 1)
    return model

def nbytes(model):
    return sum({t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}.values())

def memory(key):
    gc.collect()
    return int(re.search(key + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

class Measure:
    def __init__(self, name):
        self.name = name
        self.base = memory("VmRSS")

    def reset_peak(self):
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")

    def report(self, **numbers):
        numbers |= {"peak": memory("VmHWM") - self.base, "after": memory("VmRSS") - self.base}
        print(self.name, *(f"{key}={value}" for key, value in numbers.items()))

def optimize(model, inplace=True, dtype=torch.bfloat16):
    return ipex.llm.optimize(model, dtype=dtype, quantization_config=MAPPING, inplace=inplace)

def save_and_load(model):
    ipex.llm.save(model, sys.argv[1])
    return ipex.llm.load(sys.argv[1])

torch.set_num_threads(1)
save_and_load(optimize(build(128, 1)))  # what a first use loads for good does not count

measure = Measure("copied")
model = build(1024, 1)
full, layer = nbytes(model), model.model.layers[0].mlp.up_proj.weight.nbytes
measure.reset_peak()
quantized = optimize(model, False, torch.float32)
measure.report(full=full, layer=layer, held=nbytes(quantized))
del model, quantized

measure = Measure("inplace")
model = build(1024, 4)
full = nbytes(model)
measure.reset_peak()
optimize(model)
measure.report(full=full, layer=layer, held=nbytes(model))

ipex.llm.save(model, sys.argv[1])
held = nbytes(model)
del model
measure = Measure("loaded")
measure.reset_peak()
model = ipex.llm.load(sys.argv[1])
measure.report(full=full, held=held)
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path_factory.mktemp("model") / "saved")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    lines = (line.split() for line in result.stdout.splitlines())
    return {
        name: {key: int(value) for key, value in re.findall(r"(\w+)=(-?\d+)", " ".join(rest))} for name, *rest in lines
    }


def test_inplace_peaks_below_the_float_model_and_one_layer(measured):
    found = measured["inplace"]
    assert found["full"] > 250e6
    assert found["peak"] < found["full"] + found["layer"]


def test_one_copy_of_the_weights_is_left(measured):
    found = measured["inplace"]
    assert found["held"] < 0.2 * found["full"]
    assert found["after"] < 1.1 * found["held"] + 4e6


def test_a_copy_adds_no_more_than_the_quantized_model(measured):
    found = measured["copied"]
    assert found["peak"] < found["full"] + found["held"] + found["layer"]


def test_loading_never_makes_float_weights(measured):
    found = measured["loaded"]
    assert found["peak"] < 2.2 * found["held"] < 0.5 * found["full"]
