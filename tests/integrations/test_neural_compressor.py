import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from ipex_quant.nn import Int8Linear, WeightOnlyQuantizedLinear
from ipex_quant.quantization import convert, get_smooth_quant_qconfig_mapping, prepare

inc = pytest.importorskip("neural_compressor.torch.quantization")

from ipex_quant.integrations.neural_compressor import register  # noqa: E402


@pytest.fixture
def configs():
    return register()


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=96, initializer_range=0.2)).eval()


@pytest.fixture
def samples():
    return [torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(i)) for i in range(4)]


@pytest.fixture
def run(samples):
    def calibrate(model):
        for ids in samples:
            model(ids)

    return calibrate


def test_prepare_and_convert(configs, model, samples, run):
    mapping = get_smooth_quant_qconfig_mapping(0.3)
    expected = prepare(model, mapping, samples[0])
    run(expected)
    expected = convert(expected)(samples[0]).logits
    prepared = inc.prepare(model, configs.int8(alpha=0.3), inplace=False, example_inputs=samples[0])
    run(prepared)
    converted = inc.convert(prepared)
    assert isinstance(converted.lm_head, Int8Linear)
    assert torch.equal(converted(samples[0]).logits, expected)


@pytest.mark.parametrize("alpha", ["auto", 0.5, None])
def test_quantize_to_int8(configs, model, samples, run, alpha):
    config = configs.int8(alpha=alpha).set_local("lm_head", configs.int8(dtype="fp32"))
    quantized = inc.quantize(model, config, run_fn=run, inplace=False, example_inputs=samples[0])
    assert type(quantized.lm_head) is nn.Linear
    layer = quantized.model.layers[1].mlp
    assert all(isinstance(linear, Int8Linear) for linear in (layer.gate_proj, layer.up_proj, layer.down_proj))
    expected = model(samples[0]).logits
    assert (quantized(samples[0]).logits - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("algorithm", ["rtn", "gptq", "awq"])
def test_weight_only(configs, model, run, samples, algorithm):
    config = configs.weight_only(algorithm=algorithm, group_size=32, lowp_mode="bf16")
    quantized = inc.quantize(model, config, run_fn=run, inplace=False)
    linear = quantized.model.layers[0].self_attn.q_proj
    assert isinstance(linear, WeightOnlyQuantizedLinear)
    assert str(linear.scheme) == "int4 asym g32"
    expected = model(samples[0]).logits
    error = (quantized(samples[0]).logits - expected).norm() / expected.norm()
    assert error < {"rtn": 0.45, "gptq": 0.3, "awq": 0.4}[algorithm]


def test_autotune_chooses_from_a_space(configs, model, samples, run):
    expected = model(samples[0]).logits
    metrics = []

    def evaluate(candidate):
        error = (candidate(samples[0]).logits - expected).norm() / expected.norm()
        metrics.append(1 - error.item())
        return metrics[-1]

    space = configs.weight_only(weight_dtype=["int4", "int8"], symmetric=True, lowp_mode="none", group_size=32)
    tuned = inc.autotune(model, inc.TuningConfig(config_set=[space], tolerable_loss=0.05), evaluate)
    assert len(metrics) == 3
    assert metrics[1] < 0.95 < metrics[2]
    assert str(tuned.lm_head.scheme) == "int8 sym g32"


def test_bad_configurations(configs, model, samples, run):
    with pytest.raises(ValueError, match="run_fn: expected a function"):
        inc.quantize(model, configs.int8(), inplace=False, example_inputs=samples[0])
    with pytest.raises(ValueError, match="example_inputs: expected a tensor"):
        inc.quantize(model, configs.int8(), run_fn=run, inplace=False)
    with pytest.raises(ValueError, match='alpha: "auto" needs quantize'):
        inc.prepare(model, configs.int8(alpha="auto"), inplace=False, example_inputs=samples[0])
    with pytest.raises(ValueError, match="algorithm: expected one of"):
        inc.quantize(model, configs.weight_only(algorithm="magic"), inplace=False)
