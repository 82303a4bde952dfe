import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import ipex_quant as ipex
from ipex_quant import quantization
from ipex_quant.cpu.runtime import CPUPool, Task

WEIGHT_ONLY = quantization.get_weight_only_quant_qconfig_mapping()
X = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))


def quantized():
    model = nn.Sequential(nn.Linear(64, 32, bias=False), nn.ReLU(), nn.Linear(32, 16)).eval()
    return quantization.convert(quantization.prepare(model, WEIGHT_ONLY))


def ops(output):
    """The fields of every line for an op."""
    return [line.split(",") for line in output.splitlines() if line.startswith("ipex_quant_verbose,")]


def test_a_line_for_every_op_tells_what_ran(capfd):
    model = quantized()
    with ipex.verbose(ipex.verbose.VERBOSE_ON):
        model(X)
    lines = ops(capfd.readouterr().out)
    assert [line[:5] for line in lines] == [
        ["ipex_quant_verbose", "exec", "cpu", "woq_linear", ipex.ops.isa_name()]
    ] * 2
    for line, inputs, outputs in zip(lines, ("2x64:f32", "2x32:f32"), ("2x32:f32", "2x16:f32"), strict=True):
        assert line[5].split(" ")[0] == inputs
        assert line[6] == outputs
        assert 0 < float(line[7]) < 1e5
    model(X)
    assert ops(capfd.readouterr().out) == []


def test_the_levels_have_two_names_each():
    assert (ipex.VERBOSE_OFF, ipex.VERBOSE_ON, ipex.VERBOSE_ON_CREATION) == (0, 1, 2)
    verbose = ipex.verbose
    assert (verbose.VERBOSE_OFF, verbose.VERBOSE_ON, verbose.VERBOSE_ON_CREATION) == (0, 1, 2)
    with pytest.raises(ValueError, match=r"level: expected .* got 3"):
        ipex.verbose(3)


def test_the_innermost_level_counts(capfd):
    model = quantized()
    on = ipex.verbose(ipex.VERBOSE_ON)
    with on, on, ipex.verbose(ipex.VERBOSE_OFF):
        model(X)
    assert ops(capfd.readouterr().out) == []
    with ipex.verbose(ipex.VERBOSE_OFF), on:
        model(X)
    assert len(ops(capfd.readouterr().out)) == 2
    with pytest.raises(KeyError), on:
        raise KeyError
    model(X)
    assert ops(capfd.readouterr().out) == []


def test_lines_of_compiled_and_traced_models(capfd):
    model = quantized()
    compiled, traced = torch.compile(model, backend="aot_eager", fullgraph=True), torch.jit.trace(model, X)
    with ipex.verbose(ipex.VERBOSE_ON):
        assert torch.equal(compiled(X), traced(X))
        assert len(ops(capfd.readouterr().out)) == 4
        compiled(X)
    assert len(ops(capfd.readouterr().out)) == 2


def test_a_decode_step_in_one_call(capfd):
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = ipex.llm.optimize(LlamaForCausalLM(config).eval(), quantization_config=WEIGHT_ONLY)
    with ipex.verbose(ipex.VERBOSE_ON):
        model.generate(torch.zeros(1, 4, dtype=torch.long), max_new_tokens=2, do_sample=False)
    decode = [line for line in ops(capfd.readouterr().out) if line[3] == "decoder_layers"]
    assert len(decode) == 1
    assert decode[0][5].startswith("1x1x64:f32 14*(")


def test_streams_print_what_their_caller_prints(capfd):
    task = Task(quantized(), CPUPool())
    with ipex.verbose(ipex.VERBOSE_ON):
        task(X).get()
        with ipex.verbose(ipex.VERBOSE_OFF):
            task(X).get()
    assert len(ops(capfd.readouterr().out)) == 2
    task(X).get()
    assert ops(capfd.readouterr().out) == []


def test_streams_run_in_any_dispatch_mode_of_their_caller():
    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    task = Task(nn.ReLU(), CPUPool())
    with Count() as mode:
        task(X).get()
    assert mode.calls
    calls = mode.calls
    task(X).get()
    assert mode.calls == calls


@pytest.mark.parametrize(
    ("level", "expected", "created"),
    [("VERBOSE_OFF", False, False), ("VERBOSE_ON", True, False), ("VERBOSE_ON_CREATION", True, True)],
)
def test_lines_of_onednn(level, expected, created):
    # oneDNN writes to the file of standard output itself, and tells what was created before.
    code = f"""
        import torch, ipex_quant as ipex
        model = torch.nn.Conv2d(1, 10, 5).eval()
        x = torch.rand(1, 1, 112, 112)
        model(x)
        print("before", flush=True)
        with ipex.verbose(ipex.{level}):
            model(x)
        print("after", flush=True)
        model(x)
    """
    process = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    silent, _, rest = process.stdout.partition("before\n")
    inside, _, after = rest.partition("after\n")
    assert silent == after == ""
    assert ("onednn_verbose,v1,primitive,exec,cpu,convolution" in inside) == expected
    assert ("primitive,create" in inside) == created
