import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.ao.quantization import QConfigMapping

import ipex_quant as ipex
from ipex_quant.nn import WeightOnlyQuantizedLinear
from ipex_quant.numerics import affine
from ipex_quant.quantization import (
    WoqLowpMode,
    WoqWeightDtype,
    convert,
    get_weight_only_quant_qconfig_mapping,
    prepare,
)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 16)
        self.body = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.norm(self.body(self.embedding(tokens))))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().eval()


@pytest.fixture
def mapping():
    return get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT8)


TOKENS = torch.arange(10)


def quantized_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, WeightOnlyQuantizedLinear)]


def test_every_linear_is_replaced_and_computes_the_same_but_for_rounding(model, mapping):
    converted = convert(prepare(model, mapping))
    assert quantized_names(converted) == ["body.0", "body.2", "head"]
    reference = copy.deepcopy(model)
    for layer in (reference.body[0], reference.body[2], reference.head):
        scheme = converted.head.scheme
        layer.weight = nn.Parameter(affine.dequantize(affine.quantize(layer.weight, scheme)))
    torch.testing.assert_close(converted(TOKENS), reference(TOKENS))
    assert not torch.equal(converted(TOKENS), model(TOKENS))


def test_the_float_model_is_unchanged_unless_inplace(model, mapping):
    before = copy.deepcopy(model)
    prepared = prepare(model, mapping)
    converted = convert(prepared).to(torch.bfloat16)
    nn.init.zeros_(converted.embedding.weight)
    assert quantized_names(model) == quantized_names(prepared) == []
    for name, tensor in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert torch.equal(model(TOKENS), before(TOKENS))
    assert not hasattr(model.head, "qconfig")
    assert torch.equal(prepared(TOKENS), before(TOKENS))


def is_shared(tensor):
    return torch._C._is_cow_tensor(tensor)


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_a_copy_shares_memory_until_one_is_written_to(model, mapping, changed):
    prepared = prepare(model, mapping)
    converted = convert(prepared)
    models = (model, prepared, converted)
    assert all(is_shared(each.embedding.weight) and is_shared(each.norm.weight) for each in models)
    expected = model(TOKENS)
    assert all(is_shared(each.embedding.weight) for each in models)
    with torch.no_grad():
        models[changed].embedding.weight.zero_()
    for each in {*range(3)} - {changed}:
        assert models[each].embedding.weight.any()
    if changed != 1:
        assert torch.equal(prepared(TOKENS), expected)


def test_a_prepared_copy_has_parameters_of_its_own(model, mapping):
    prepared = prepare(model, mapping)
    assert prepared.head.weight is prepared.embedding.weight
    prepared.to(torch.bfloat16)
    assert model.head.weight.dtype == torch.float32


def test_weights_in_mapped_memory_are_copied(model, mapping, tmp_path):
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    model.load_state_dict(torch.load(tmp_path / "weights.pt", mmap=True), assign=True)
    model.head.weight = model.embedding.weight
    prepared = prepare(model, mapping)
    assert prepared.embedding.weight.data_ptr() != model.embedding.weight.data_ptr()
    assert torch.equal(prepared(TOKENS), model(TOKENS))


def test_inplace_changes_the_model_itself(model, mapping):
    weight = model.embedding.weight.clone()
    assert prepare(model, mapping, inplace=True) is model
    assert convert(model, inplace=True) is model
    assert quantized_names(model) == ["body.0", "body.2", "head"]
    assert torch.equal(model.embedding.weight, weight)
    assert not any(hasattr(module, "qconfig") for module in model.modules())


@pytest.mark.parametrize("inplace", [False, True])
def test_a_shared_module_stays_shared(mapping, inplace):
    layer = nn.Linear(8, 8)
    converted = convert(prepare(nn.Sequential(layer, nn.Sequential(layer)), mapping, inplace=inplace), inplace=inplace)
    assert isinstance(converted[0], WeightOnlyQuantizedLinear)
    assert converted[0] is converted[1][0]


@pytest.mark.parametrize("inplace", [False, True])
def test_a_lone_linear_is_replaced(mapping, inplace):
    layer = nn.Linear(8, 8)
    converted = convert(prepare(layer, mapping, inplace=inplace), inplace=inplace)
    assert isinstance(converted, WeightOnlyQuantizedLinear)
    assert layer.weight.numel() == 64


@pytest.mark.parametrize("inplace", [False, True])
def test_forward_hooks_stay(model, mapping, inplace):
    calls = []
    handle = model.head.register_forward_hook(lambda *_, **__: calls.append("after"), with_kwargs=True)
    model.head.register_forward_pre_hook(lambda *_: calls.append("before"))
    converted = convert(prepare(model, mapping, inplace=inplace), inplace=inplace)
    converted(TOKENS)
    assert calls == ["before", "after"]
    if inplace:
        handle.remove()
        converted(TOKENS)
        assert calls == ["before", "after", "before"]


def test_rules_of_the_mapping_count(model, mapping):
    mapping.set_module_name("head", None)
    mapping.set_module_name(
        "body.0",
        get_weight_only_quant_qconfig_mapping(
            weight_dtype=WoqWeightDtype.INT4, lowp_mode=WoqLowpMode.BF16
        ).global_qconfig,
    )
    converted = convert(prepare(model, mapping))
    assert type(converted.head) is nn.Linear
    assert converted.body[0].dtype == WoqWeightDtype.INT4
    assert converted.body[0].lowp_mode == WoqLowpMode.BF16
    assert converted.body[2].dtype == WoqWeightDtype.INT8


def test_preparing_again_forgets_the_first_time(model, mapping):
    prepare(model, mapping, inplace=True)
    prepare(model, get_weight_only_quant_qconfig_mapping().set_module_name("body", None), inplace=True)
    assert quantized_names(convert(model)) == ["head"]


def test_a_converted_model_can_be_prepared_for_the_rest(model, mapping):
    first = convert(prepare(model, get_weight_only_quant_qconfig_mapping().set_module_name("head", None)))
    assert quantized_names(convert(prepare(first, mapping))) == ["body.0", "body.2", "head"]
    again = convert(prepare(convert(prepare(model, mapping)), mapping))
    assert quantized_names(again) == ["body.0", "body.2", "head"]


def test_many_layers_show_a_progress_bar(mapping, capfd):
    convert(prepare(nn.Sequential(*(nn.Linear(2, 2) for _ in range(15))), mapping))
    assert capfd.readouterr().err == ""
    convert(prepare(nn.Sequential(*(nn.Linear(2, 2) for _ in range(16))), mapping))
    assert "16/16" in capfd.readouterr().err


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(model, mapping, value, inplace):
    with torch.no_grad():
        model.body[2].weight[3, 4] = value
    with pytest.raises(ValueError, match=r"body\.2: .*NaN"):
        convert(prepare(model, mapping, inplace=inplace), inplace=inplace)


@pytest.mark.parametrize("inplace", [False, True])
def test_nothing_to_quantize_gives_the_model_with_a_warning(model, mapping, inplace):
    relu = nn.ReLU()
    with pytest.warns(UserWarning, match="stays in float: nothing to quantize: ReLU has no linear layer"):
        assert type(convert(prepare(relu, mapping))) is nn.ReLU
    model.double()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    match = r"none of the 3 linear layers can be quantized: body\.0: its weight is .*64"
    with pytest.warns(UserWarning, match=match) as caught:
        converted = convert(prepare(model, mapping, inplace=inplace), inplace=inplace)
    assert [Path(warning.filename) for warning in caught] == [Path(__file__)]
    assert (converted is model) == inplace
    assert converted.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in converted.state_dict().items())
    assert not hasattr(converted, "q_config")
    with pytest.warns(UserWarning, match=r"head: the mapping's set_global is None"):
        convert(prepare(model, QConfigMapping()))


def test_a_model_that_stays_mostly_in_float_warns_unless_told_so(mapping, recwarn):
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Scaled(8, 8), Scaled(8, 8), nn.Linear(8, 8))
    convert(prepare(model, copy.deepcopy(mapping).set_module_name("0", None).set_module_name("1", None)))
    convert(prepare(model[1:], mapping))
    assert not recwarn
    with pytest.warns(
        UserWarning, match=r"float: 2 linear layers cannot be quantized; ipex\.explain\(model\) says why"
    ):
        convert(prepare(model, mapping))


def test_convert_needs_a_prepared_model(model, mapping):
    with pytest.raises(RuntimeError, match="Please do prepare the model before doing convert"):
        convert(model)
    with pytest.raises(RuntimeError, match="Please do prepare"):
        convert(convert(prepare(model, mapping)))


def test_wrong_arguments_raise(model, mapping):
    with pytest.raises(TypeError, match=r"Only support nn.Module prepare"):
        prepare(torch.relu, mapping)
    with pytest.raises(TypeError, match=r"Only support nn.Module convert"):
        convert(torch.relu)
    with pytest.raises(TypeError, match="configure should be an instance of QConfigMapping or QConfig, but got"):
        prepare(model, {"": None})


def test_a_plain_qconfig_is_deprecated(model, mapping):
    with pytest.warns(DeprecationWarning, match="QConfig are deprecated. Please use QConfigMapping instead"):
        prepared = prepare(model, mapping.global_qconfig)
    assert len(quantized_names(convert(prepared))) == 3


def test_the_package_offers_them(model, mapping):
    assert ipex.quantization.prepare is prepare
    assert ipex.quantization.convert is convert
    assert callable(ipex.quantization.gptq)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        ipex.quantization.nonsense  # noqa: B018


def test_a_bad_regex_raises(model, mapping):
    with pytest.raises(ValueError, match=r"set_module_name_regex: '\(' is no regex"):
        prepare(model, mapping.set_module_name_regex("(", None))
