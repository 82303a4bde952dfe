import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from ipex_quant import data, evaluation, llm
from ipex_quant.autotune import Report, WeightOnlySpace, autotune
from ipex_quant.autotune.batches import read_batches
from ipex_quant.autotune.budget import Budget
from ipex_quant.autotune.weight_only import WeightOnlyQuantizer
from ipex_quant.nn import QuantizedModule, WeightOnlyQuantizedLinear
from ipex_quant.numerics.scheme import WoqLowpMode, WoqWeightDtype, WoqWeightQScheme
from ipex_quant.quantization import get_smooth_quant_qconfig_mapping, get_weight_only_quant_qconfig_mapping
from ipex_quant.woq.awq import AwqOptions
from ipex_quant.woq.awq_blocks import awq_blocks

from .conftest import SAMPLES, SEQUENCE_LENGTH, TUNING_TOKENS


@pytest.fixture(scope="module")
def compare(make_model, tokenizer):
    """Compares a model with the float embedded model on held-out text."""
    reference = make_model(outliers=False)
    held_out = data.held_out_text()
    return lambda model: evaluation.compare(reference, model, tokenizer, held_out, SEQUENCE_LENGTH, TUNING_TOKENS)


@pytest.fixture(scope="module")
def tuned(make_model, batches, compare, tmp_path_factory):
    """The model tuned to 0.56 bytes a weight, with all trials, and where its report is."""
    folder = tmp_path_factory.mktemp("weight_only")
    model = autotune(
        make_model(outliers=False),
        batches,
        eval_func=lambda model: -compare(model).kl_divergence,
        sampling_sizes=[SAMPLES],
        accuracy_criterion={"absolute": 0.05},
        tuning_time=10_000,
        quantization_config=WeightOnlySpace(algorithms=["gptq", "rtn"]),
        max_bytes_per_weight=0.56,
        record=folder / "trials.jsonl",
        report=[folder / "report.html", folder / "report.json"],
    )
    return model, folder


def test_mixed_precision_within_a_budget_beats_uniform_int4(tuned):
    _, folder = tuned
    report = Report.of(folder / "trials.jsonl")
    kl = {trial.label.split(",")[0]: -trial.metric for trial in report.trials}
    assert all(trial.bytes_per_weight <= 0.56 for trial in report.trials)
    assert kl["RTN mixed"] < 0.85 * kl["RTN int4 asym g64"]
    assert kl["GPTQ mixed"] < 0.85 * kl["GPTQ int4 asym g64"]
    assert kl["GPTQ mixed"] < 0.8 * kl["RTN mixed"]
    assert kl["GPTQ int4 asym g64"] < 0.8 * kl["RTN int4 asym g64"]
    assert report.trials[report.best].label.startswith("GPTQ mixed")
    assert (folder / "report.html").stat().st_size > 5000


def test_the_reports_figures_are_those_of_the_saved_model(tuned, compare, tmp_path):
    model, folder = tuned
    report = Report.of(folder / "trials.jsonl")
    best = report.trials[report.best]
    llm.save(model, tmp_path / "model")
    loaded = llm.load(tmp_path / "model")
    assert -compare(loaded).kl_divergence == best.metric
    assert evaluation.model_bytes(loaded) == best.model_bytes
    modules = [module for module in loaded.modules() if isinstance(module, WeightOnlyQuantizedLinear)]
    weights = sum(module.weight_shape[0] * module.weight_shape[1] for module in modules)
    assert sum(module.nbytes for module in modules) / weights == best.bytes_per_weight


def test_at_equal_size_mixed_precision_beats_every_uniform_choice(make_model, batches, compare):
    space = WeightOnlySpace(algorithms=["rtn"])
    model = make_model(outliers=False)
    examples = read_batches(model, batches, SAMPLES)
    quantizer = WeightOnlyQuantizer(model, examples, space, Budget(), frozenset(), 0)
    uniform = {
        str(choice["lm_head"].scheme): sum(option.bytes for option in choice.values())
        for choice in quantizer._uniform(WoqLowpMode.INT8, "rtn")
    }
    size = uniform["int4 asym g128"]
    mixed, same = quantizer._candidates(size, WoqLowpMode.INT8)
    assert str(same).startswith("RTN int4 asym g128")
    kl = {recipe: compare(quantizer.quantized(recipe)).kl_divergence for recipe in (mixed, same)}
    assert kl[mixed] < 0.9 * kl[same]
    estimated = {r: sum(layer["error"] for layer in quantizer.sensitivity(r).values()) for r in (mixed, same)}
    for recipe, divergence in kl.items():
        assert estimated[recipe] == pytest.approx(divergence, rel=0.15), "the estimate is in nats a token"


def test_layers_that_share_their_input_have_one_scheme(tuned):
    model, _ = tuned
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        assert attention.q_proj.scheme == attention.k_proj.scheme == attention.v_proj.scheme
        assert mlp.gate_proj.scheme == mlp.up_proj.scheme
    assert len({module.scheme for module in model.modules() if isinstance(module, WeightOnlyQuantizedLinear)}) > 1


def test_awq_scales_norms_of_a_copy_only():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=96, initializer_range=0.2)).eval()
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[5] = 30.0
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = [torch.randint(0, 96, (2, 24)) for _ in range(3)]
    examples = read_batches(model, ids, 6)
    space = WeightOnlySpace([WoqWeightDtype.INT4], [32], algorithms=["rtn", "awq"], lowp_modes=[WoqLowpMode.NONE])
    quantizer = WeightOnlyQuantizer(model, examples, space, Budget(), frozenset(), 0)
    recipes = {recipe.algorithm: recipe for recipe in quantizer._candidates(1e9, WoqLowpMode.NONE)}
    found = quantizer.quantized(recipes["awq"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    in_half = AwqOptions(scale_dtype=torch.float16)
    expected = awq_blocks(model, [{"input_ids": each} for each in ids], dict(recipes["awq"].schemes).get, in_half)
    assert expected.parameters, "some group is scaled"
    assert all(torch.equal(found.get_parameter(name), value) for name, value in expected.parameters.items())
    for name, weight in expected.weights.items():
        packed = found.get_submodule(name).quantized_weight()
        assert torch.equal(packed.codes, weight.codes)
        assert torch.equal(packed.scales, packed.scales.half().float())
    logits = model(ids[0]).logits
    error = {name: (quantizer.quantized(r)(ids[0]).logits - logits).norm() for name, r in recipes.items()}
    assert error["awq"] < 0.9 * error["rtn"]


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 8)).eval()


@pytest.fixture
def tiny_batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 64, generator=generator) for _ in range(4)]


def test_a_plain_model_and_a_mapping(tiny, tiny_batches):
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    mapping = get_weight_only_quant_qconfig_mapping(
        weight_dtype=WoqWeightDtype.INT4, group_size=32, lowp_mode=WoqLowpMode.BF16
    )
    options = {"quantization_config": mapping, "accuracy_criterion": {"relative": 0.1}}
    model = autotune(tiny, tiny_batches, **options)
    assert [str(model[i].scheme) for i in (0, 2, 4)] == ["int4 asym g32"] * 3
    assert model[0].lowp_mode == WoqLowpMode.BF16
    assert type(tiny[0]) is nn.Linear
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.state_dict().items())
    mapping.set_module_name("2", None)
    model = autotune(tiny, tiny_batches, **options)
    assert [isinstance(model[i], QuantizedModule) for i in (0, 2, 4)] == [True, False, True]
    assert autotune(tiny, tiny_batches, **options, inplace=True) is tiny
    assert isinstance(tiny[0], QuantizedModule)


def test_the_smallest_size_that_meets_the_criterion(tiny, tiny_batches, tmp_path):
    loose, strict = (
        autotune(
            tiny,
            tiny_batches,
            quantization_config=WeightOnlySpace(),
            accuracy_criterion={"relative": loss},
            report=tmp_path / f"{loss}.json",
        )
        for loss in (0.05, 1e-4)
    )
    assert evaluation.model_bytes(loose) < evaluation.model_bytes(strict) < evaluation.model_bytes(tiny)


def test_op_type_dict(tiny, tiny_batches):
    fp32 = {"weight": {"dtype": ["fp32"]}}
    model = autotune(tiny, tiny_batches, quantization_config=WeightOnlySpace(), op_type_dict={"2": fp32})
    assert [isinstance(model[i], QuantizedModule) for i in (0, 2, 4)] == [True, False, True]


def test_one_member_of_a_share_group_may_stay_in_float(make_model, batches):
    name = "model.layers.0.self_attn.q_proj"
    model = make_model(outliers=False)
    space = WeightOnlySpace(algorithms=["rtn"])
    quantizer = WeightOnlyQuantizer(model, read_batches(model, batches, 1), space, Budget(), frozenset([name]), 0)
    assert quantizer.groups[name] == (name,)
    for recipe in quantizer._candidates(1e9, WoqLowpMode.INT8):
        assert [each for each, scheme in recipe.schemes if scheme is None] == [name]


def test_a_fused_model_is_sampled_too(make_model, batches):
    model = make_model(outliers=False)
    fused = llm.optimize(model, dtype=torch.float32)
    quantizers = [
        WeightOnlyQuantizer(
            each, read_batches(each, batches, 2), WeightOnlySpace(algorithms=["rtn"]), Budget(), frozenset(), 0
        )
        for each in (model, fused)
    ]
    assert quantizers[0].groups == quantizers[1].groups
    plain, native = ([c.weight_error for costs in each.costs.costs.values() for c in costs] for each in quantizers)
    assert native == pytest.approx(plain, rel=1e-3)


def test_the_output_layer_may_stay_in_float(make_model, batches):
    model = make_model(outliers=False)
    space = WeightOnlySpace(algorithms=["rtn"], lm_head=[False], mixed=False)
    tuned = autotune(model, batches[:2], quantization_config=space, accuracy_criterion={"absolute": 1.0})
    both = WeightOnlySpace(algorithms=["rtn"], lm_head=[True, False])
    quantizer = WeightOnlyQuantizer(model, read_batches(model, batches, 1), both, Budget(), frozenset(), 0)
    heads = [choice["lm_head"].scheme is None for choice in quantizer._uniform(WoqLowpMode.INT8, "rtn")]
    assert heads == [False, True] * len(both.schemes(WoqLowpMode.INT8))
    assert type(tuned.lm_head) is nn.Linear
    assert isinstance(tuned.model.layers[0].self_attn.q_proj, QuantizedModule)


def test_gradients_leave_no_trace(make_model, batches):
    model = make_model(outliers=False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    quantizer = WeightOnlyQuantizer(
        model, read_batches(model, batches, 1), WeightOnlySpace(algorithms=["rtn"]), Budget(), frozenset(), 0
    )
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    options = quantizer.costs.options("lm_head", WoqLowpMode.INT8, "rtn")
    int8 = next(o for o in options if o.scheme and o.scheme.dtype == WoqWeightDtype.INT8)
    assert 0 < int8.error < min(o.error for o in options if "int4" in str(o.scheme)) / 10


def test_bad_arguments(tiny, tiny_batches):
    for error, match, options in (
        (ValueError, "max_bytes_per_weight: expected a number above 0", {"max_bytes_per_weight": 0}),
        (ValueError, r"max_bytes_per_weight: 0.1 is too few.*smallest take 0\.67", {"max_bytes_per_weight": 0.1}),
        (TypeError, "quantization_config: expected a WeightOnlySpace", {"quantization_config": "int4"}),
        (
            TypeError,
            "quantization_config: expected a WeightOnlySpace",
            {"quantization_config": get_smooth_quant_qconfig_mapping()},
        ),
        (
            ValueError,
            "smoothquant_args, calib_func: they are for static INT8",
            {"max_bytes_per_weight": 1, "smoothquant_args": {}},
        ),
    ):
        with pytest.raises(error, match=match):
            autotune(tiny, tiny_batches, **options)
    with pytest.raises(ValueError, match="algorithms: expected some of"):
        WeightOnlySpace(algorithms=["magic"])
    with pytest.raises(ValueError, match="group_sizes: expected at least one value"):
        WeightOnlySpace(group_sizes=[])
    with pytest.raises(ValueError, match="none of its combinations exists for lowp_mode INT8"):
        WeightOnlySpace(weight_dtypes=[WoqWeightDtype.INT8], qschemes=[WoqWeightQScheme.ASYMMETRIC]).schemes(
            WoqLowpMode.INT8
        )
