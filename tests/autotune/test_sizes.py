import itertools

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from ipex_quant.autotune import TuningOptions, sizes, tune, tuner
from ipex_quant.numerics.scheme import WoqLowpMode, WoqWeightDtype
from ipex_quant.quantization import convert, get_weight_only_quant_qconfig_mapping, prepare


@pytest.fixture
def llama():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2, vocab_size=40)).eval()


@pytest.fixture
def clock(monkeypatch):
    """A clock of which every other reading is as many milliseconds later as the test says."""

    def set_clock(*milliseconds):
        ticks = itertools.accumulate(itertools.chain.from_iterable((0.0, ms / 1e3) for ms in milliseconds))
        monkeypatch.setattr(sizes.time, "perf_counter", lambda: next(ticks))

    return set_clock


def test_weight_bytes_counts_quantized_and_float_linears():
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.LayerNorm(64), nn.Linear(64, 8, dtype=torch.bfloat16))
    assert sizes.weight_bytes(model) == (64 * 64 * 4 + 64 * 8 * 2, 64 * 64 + 64 * 8)
    mapping = get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT4).set_module_name("2", None)
    quantized = convert(prepare(model, mapping))
    assert sizes.weight_bytes(quantized) == (quantized[0].nbytes + 64 * 8 * 2, 64 * 64 + 64 * 8)
    assert 64 * 64 / 2 < quantized[0].nbytes < 64 * 64


def test_the_bandwidth_is_that_of_the_best_round(clock):
    clock(5, 4, 8, 4, 6)
    assert sizes.read_bandwidth() == pytest.approx((1 << 27) / 4e-3)


def test_a_decode_step_is_the_median_of_several(llama, clock):
    lengths = []
    llama.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    clock(*[1, 2, 3] * 4)
    assert sizes.decode_step_ms(llama) == pytest.approx(2.0)
    assert lengths == [8, *[1] * 12], "a prompt, and steps of one token"


def test_no_decode_step_is_timed_of_a_model_that_makes_none(llama):
    assert sizes.decode_step_ms(nn.Linear(4, 4)) is None
    t5 = T5ForConditionalGeneration(T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=40))
    assert sizes.decode_step_ms(t5) is None
    llama.forward = lambda **kwargs: None  # decodes in another way
    assert sizes.decode_step_ms(llama) is None


def test_a_prediction_is_the_time_to_read_the_weights(llama, monkeypatch):
    """No step is faster than reading what it multiplies with, all of the linears and nothing else."""
    monkeypatch.setattr(tuner, "read_bandwidth", lambda: 1e6)
    batches = [torch.arange(24).reshape(2, 12)]
    space = get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT8, lowp_mode=WoqLowpMode.BF16)
    tuned, report = tune(llama, batches, TuningOptions(eval_func=lambda model: 1.0, quantization_config=space))
    (trial,) = [trial for trial in report.trials if trial.index == report.best]
    weights = sum(module.weight.numel() for module in llama.modules() if isinstance(module, nn.Linear))
    read = sum(module.nbytes for module in tuned.modules() if hasattr(module, "nbytes"))
    assert trial.bytes_per_weight == pytest.approx(read / weights)
    assert trial.predicted_ms == pytest.approx(1e3 * read / 1e6)
    assert trial.predicted_ms >= 1e3 * weights / 1e6, "a byte a weight at least"
    assert trial.measured_ms > 0
