import pytest
import torch
from torch import nn

from ipex_quant import data, evaluation
from ipex_quant.autotune import autotune
from ipex_quant.autotune.batches import read_batches
from ipex_quant.autotune.calibration_pass import SAMPLE_ROWS, collect
from ipex_quant.autotune.candidate import AUTO, Int8Candidate
from ipex_quant.autotune.static import AlphaSearch, StaticQuantizer, layer_type
from ipex_quant.nn import Int8Conv, Int8Linear
from ipex_quant.quantization import calibrate, convert, default_static_qconfig_mapping, prepare
from ipex_quant.quantization import get_smooth_quant_qconfig_mapping as smooth_mapping

from .conftest import SAMPLES, SEQUENCE_LENGTH


@pytest.fixture(scope="module")
def quantizer(make_model, batches):
    model = make_model()
    return StaticQuantizer(collect(model, read_batches(model, batches, SAMPLES), [4, SAMPLES]), [AUTO], AlphaSearch())


@pytest.mark.parametrize(("alpha", "samples"), [(0.5, SAMPLES), (None, 4)])
def test_a_recipe_is_what_prepare_calibrate_and_convert_make(quantizer, make_model, batches, alpha, samples):
    mapping = default_static_qconfig_mapping if alpha is None else smooth_mapping(alpha)
    prepared = prepare(make_model(), mapping, example_kwarg_inputs=batches[0])
    state = convert(calibrate(prepared, batches[:samples])).state_dict()
    found = quantizer.quantized(Int8Candidate(alpha, samples)).state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.items())


def test_auto_is_at_least_as_good_as_the_best_fixed_alpha(quantizer, make_model, tokenizer):
    reference = make_model(outliers=False)
    divergence = {
        alpha: evaluation.compare(
            reference,
            quantizer.quantized(Int8Candidate(alpha, SAMPLES)),
            tokenizer,
            data.held_out_text(),
            SEQUENCE_LENGTH,
            4096,
        ).kl_divergence
        for alpha in (AUTO, 0.3, 0.5, 0.7)
    }
    best = min(divergence[alpha] for alpha in (0.3, 0.5, 0.7))
    assert divergence[AUTO] <= 1.01 * best  # within what kernels of one CPU and another differ by


def test_the_errors_are_those_of_the_layers(quantizer, make_model, batches):
    """On the inputs of a batch that they were not estimated with."""
    model, name = make_model(), "model.layers.1.mlp.down_proj"
    quantized = quantizer.quantized(Int8Candidate(0.5, SAMPLES))
    inputs = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        model(**batches[1])
        handle.remove()
        exact = model.get_submodule(name)(inputs[0])
        actual = quantized.get_submodule(name)(inputs[0])
    error = ((actual - exact).square().sum() / exact.square().sum()).item()
    assert quantizer.plan(Int8Candidate(0.5, SAMPLES)).errors[name] == pytest.approx(error, rel=0.6)


def test_members_of_a_share_group_have_one_alpha(quantizer):
    alphas = quantizer.plan(Int8Candidate(AUTO, SAMPLES)).alphas
    for i in range(6):
        attention = f"model.layers.{i}.self_attn"
        assert len({alphas[f"{attention}.{name}_proj"] for name in "qkv"}) == 1
    assert len(set(alphas.values())) > 1


def test_a_block_may_have_one_alpha(make_model, batches):
    """The one with which the block, converted for real, errs least on the call that calibration kept."""
    model = make_model()
    calibration = collect(model, read_batches(model, batches, 4), [4], blocks=True)
    search = AlphaSearch(alphas=(0.0, 0.6), by_block=True)
    quantizer = StaticQuantizer(calibration, [AUTO], search)
    alphas = quantizer.plan(Int8Candidate(AUTO, 4)).alphas
    for i in range(6):
        assert {alpha for name, alpha in alphas.items() if name.startswith(f"model.layers.{i}.")} == {0.6}
    name = "model.layers.2"
    call = calibration.block_calls[name]
    exact = model.get_submodule(name)(*call.args, **call.kwargs)
    for alpha in search.alphas:
        converted = quantizer.quantized(Int8Candidate(alpha, 4)).get_submodule(name)
        actual = converted(*call.args, **call.kwargs)
        error = ((actual - exact).square().sum() / exact.square().sum()).item()
        groups = [group for group in calibration.groups if group.name.startswith(f"{name}.")]
        assert quantizer._error(4, name, groups, alpha) == pytest.approx(error, rel=0.5)


def test_the_sample_of_an_input_is_bounded_and_the_same_each_time(quantizer, make_model, batches):
    samples = quantizer.calibration.samples
    assert {len(sample) for sample in samples.values()} == {SAMPLE_ROWS}
    model = make_model()
    again = collect(model, read_batches(model, batches, SAMPLES), [SAMPLES]).samples
    assert all(torch.equal(again[name], sample) for name, sample in samples.items())


def test_convolutions(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 10)
    )
    batches = [torch.randn(4, 3, 8, 8) for _ in range(4)]
    for x in batches:
        model(x)  # statistics of the BatchNorm
    model.eval()
    prepared = autotune(model, batches, accuracy_criterion={"relative": 0.02}, report=tmp_path / "report.json")
    converted = convert(prepared)
    assert [type(module) for module in (converted[0], converted[3], converted[5])] == [
        Int8Conv,
        Int8Conv,
        Int8Linear,
    ]
    error = (converted(batches[0]) - model(batches[0])).norm() / model(batches[0]).norm()
    assert error < 0.05


def test_types_of_layers():
    assert layer_type("model.layers.0.mlp.down_proj", nn.Linear(1, 1)) == "down_proj"
    assert layer_type("0.3", nn.Linear(1, 1)) == "Linear"
    assert layer_type("features.conv", nn.Conv2d(1, 1, 1)) == "Conv2d"
