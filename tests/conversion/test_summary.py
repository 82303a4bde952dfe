"""The qconf summary: IPEX's own files, round trips, edits, and files that belong elsewhere."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import ipex_quant as ipex
from ipex_quant.conversion.observed import observed
from ipex_quant.conversion.parameters import group_parameters
from ipex_quant.conversion.prepare import prepare_with_summary
from ipex_quant.nn import Int8Linear
from ipex_quant.nn.linears import is_linear
from ipex_quant.quantization import convert, get_smooth_quant_qconfig_mapping, prepare

DATA = Path(__file__).parent / "data"
"""``ipex_qconf_*.json`` were written by ``save_qconf_summary`` of IPEX 2.8.0."""


class Attention(nn.Module):
    """The module that IPEX wrote ipex_qconf_shared.json and ipex_qconf_unshared.json for."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.o = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        q, k = self.q(x), self.k(x)
        weights = torch.matmul(q, k.transpose(-1, -2))
        return self.o(torch.matmul(weights, k)).add(x)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Attention(), Attention()])
        self.head = nn.Linear(4, 6)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def attention():
    torch.manual_seed(0)
    return Attention().eval().requires_grad_(False)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().eval().requires_grad_(False)


def smooth(**options):
    return get_smooth_quant_qconfig_mapping(**options)


def static():
    return ipex.quantization.default_static_qconfig_mapping


def prepared_for(model, mapping, calibrate=True):
    prepared = prepare(model, mapping, example_inputs=X)
    if calibrate:
        prepared(X)
    return prepared


def written(prepared, path):
    prepared.save_qconf_summary(qconf_summary=path)
    return json.loads(path.read_text())


# ----------------------------------------------------------------------------------------------------------- real files
@pytest.mark.parametrize("shared", [True, False])
def test_a_file_of_ipex_is_read_and_written_back_unchanged(attention, tmp_path, shared):
    file = DATA / ("ipex_qconf_shared.json" if shared else "ipex_qconf_unshared.json")
    prepared = prepared_for(attention, smooth(share_weight_observers=shared), calibrate=False)
    prepared.load_qconf_summary(qconf_summary=file)
    prepared.save_qconf_summary(qconf_summary=tmp_path / "out.json")
    assert (tmp_path / "out.json").read_text() == file.read_text()

    converted = convert(prepared)
    infos = json.loads(file.read_text())[" "]["q_op_infos"]
    for name, index in {"q": "0", "k": "1", "o": "4"}.items():
        layer, source = getattr(converted, name), infos[index]["input_tensor_infos"][0]
        key = "0_0" if shared and name == "k" else f"{index}_0"
        assert layer.activation.scale == source["scale"][key][0]
        assert layer.activation.zero_point == source["zero_point"][key][0]
        assert layer.activation.smoothing_factor.tolist() == source["smooth_quant_scaling_factor"][key]
        assert layer.quantized_weight().scales[:, 0].tolist() == infos[index]["weight_tensor_infos"][0]["scale"]
    assert (converted.q.share_group is converted.k.share_group) == shared


def test_layers_are_matched_by_name_not_by_position(attention, tmp_path):
    document = json.loads((DATA / "ipex_qconf_shared.json").read_text())
    ops = document[" "]["q_op_infos"]
    document[" "]["q_op_infos"] = {"7": ops["4"], "0": ops["0"], "3": ops["1"]}
    (tmp_path / "moved.json").write_text(json.dumps(document))
    activations = []
    for file in (DATA / "ipex_qconf_shared.json", tmp_path / "moved.json"):
        prepared = prepared_for(attention, smooth(), calibrate=False)
        prepared.load_qconf_summary(file)
        activations.append([(m.activation.scale, m.activation.zero_point) for m in int8_layers(convert(prepared))])
    assert activations[0] == activations[1]


def int8_layers(model):
    return [module for module in model.modules() if isinstance(module, Int8Linear)]


def test_calibrating_after_loading_updates_layers_and_leaves_other_entries(attention, tmp_path):
    before = json.loads((DATA / "ipex_qconf_shared.json").read_text())[" "]
    prepared = prepared_for(attention, smooth(), calibrate=False)
    prepared.load_qconf_summary(DATA / "ipex_qconf_shared.json")
    prepared(X)
    after = written(prepared, tmp_path / "out.json")[" "]
    for index in before["q_op_infos"]:
        old, new = before["q_op_infos"][index], after["q_op_infos"][index]
        assert (old != new) == old["op_type_is_module"]
        assert old.keys() == new.keys()
    assert after["nonq_op_infos"] == before["nonq_op_infos"]
    assert after["layer_output_infos"] == before["layer_output_infos"]
    fresh = written(prepared_for(attention, smooth()), tmp_path / "fresh.json")[" "]["q_op_infos"]
    assert after["q_op_infos"]["0"]["weight_tensor_infos"] == fresh["0"]["weight_tensor_infos"]
    assert after["q_op_infos"]["1"]["input_tensor_infos"] == fresh["1"]["input_tensor_infos"]


def test_the_form_is_that_of_ipex(attention, tmp_path):
    """Each layer's entry has the keys that IPEX's has, and the same observers and dtypes."""
    theirs = json.loads((DATA / "ipex_qconf_shared.json").read_text())[" "]["q_op_infos"]
    ours = written(prepared_for(attention, smooth()), tmp_path / "out.json")
    assert list(ours) == [" "]
    ours = ours[" "]["q_op_infos"]
    for mine, other in ((ours["0"], theirs["0"]), (ours["1"], theirs["1"]), (ours["2"], theirs["4"])):
        assert mine.keys() == other.keys()
        for key in ("op_type", "op_type_is_module", "fqn", "activation_observer", "weight_observer"):
            assert mine[key] == other[key]
        assert mine["input_tensor_infos"][0].keys() == other["input_tensor_infos"][0].keys()
        assert mine["weight_tensor_infos"][0].keys() == other["weight_tensor_infos"][0].keys()
    assert ours["0"]["input_tensor_infos"] == ours["1"]["input_tensor_infos"]


class TwoBlockAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 4, bias=False), nn.Linear(8, 4, bias=False)
        self.o = nn.Linear(4, 8)

    def forward(self, x):
        q, k, v = self.q(x)[..., :4], self.k(x), self.v(x)
        scores = torch.softmax(torch.matmul(q, k.transpose(-1, -2)), dim=-1)
        return self.o(torch.matmul(scores, v))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up = nn.Linear(8, 6, bias=False), nn.Linear(8, 6, bias=False)
        self.down = nn.Linear(6, 8)

    def forward(self, x):
        return self.down(nn.functional.gelu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attn, self.mlp = TwoBlockAttention(), Mlp()

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TwoBlocks(nn.Module):
    """The module that IPEX wrote the other files for, with ``bn_folding=False``; with True the traced one."""

    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.embed, self.model.norm = nn.Embedding(16, 8), nn.LayerNorm(8)
        self.model.layers = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(8, 16, bias=False)

    def forward(self, input_ids):
        x = self.model.embed(input_ids)
        for layer in self.model.layers:
            x = layer(x)
        return self.lm_head(self.model.norm(x))


@pytest.fixture
def two_blocks():
    model = TwoBlocks().eval().requires_grad_(False)
    tensors = load_file(DATA / "ipex_two_blocks.safetensors")
    weights = {name.removeprefix("weights."): each for name, each in tensors.items() if name.startswith("weights.")}
    model.load_state_dict(weights)
    return model, [tensors[f"input_ids.{i}"] for i in range(3)]


@pytest.mark.parametrize(
    "name", ["static", "smoothquant", "smoothquant_unshared", "smoothquant_edited", "smoothquant_traced"]
)
def test_a_nested_model_of_ipex(two_blocks, tmp_path, name):
    model, batches = two_blocks
    file = DATA / f"ipex_qconf_{name}.json"
    mapping = static() if name == "static" else smooth(share_weight_observers="unshared" not in name)
    prepared = prepare(model, mapping, example_inputs=batches[0])
    prepared.load_qconf_summary(file)
    prepared.save_qconf_summary(tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == json.loads(file.read_text())
    converted = convert(prepared)
    in_float = {n for n, module in converted.named_modules() if is_linear(module)}
    edited = {"model.layers.0.attn.q", "model.layers.0.mlp.down"}
    assert in_float == (edited if name == "smoothquant_edited" else set())
    expected, actual = model(batches[0]), converted(batches[0])
    assert 0 < (actual - expected).norm() / expected.norm() < 0.02

    from_file = prepare_with_summary(model, mapping, file, None, inplace=False)
    groups = [[layer.name.rpartition(".")[2] for layer in group.layers] for group in observed(from_file).groups]
    assert sorted(groups) == sorted([["q", "k", "v"], ["o"], ["gate", "up"], ["down"]] * 2 + [["lm_head"]])


@pytest.mark.parametrize("name", ["smoothquant", "smoothquant_unshared"])
def test_calibration_finds_what_ipex_found(two_blocks, tmp_path, name):
    model, batches = two_blocks
    prepared = prepare(model, smooth(share_weight_observers="unshared" not in name), example_inputs=batches[0])
    for batch in batches:
        prepared(batch)
    ours = dict(_ops(written(prepared, tmp_path / "out.json")))
    theirs = dict(_ops(json.loads((DATA / f"ipex_qconf_{name}.json").read_text())))
    assert ours.keys() == {name for name, op in theirs.items() if op["op_type_is_module"]}
    for layer, op in ours.items():
        ours_in, theirs_in = op["input_tensor_infos"][0], theirs[layer]["input_tensor_infos"][0]
        for key in ("scale", "zero_point", "smooth_quant_scaling_factor"):  # by layer: IPEX counts other ops as well
            mine, other = list(ours_in[key].values()), list(theirs_in[key].values())
            torch.testing.assert_close(torch.tensor(mine), torch.tensor(other), rtol=2e-6, atol=0)
        for key in ("scale", "smooth_quant_scaling_factor"):
            mine, other = op["weight_tensor_infos"][0][key], theirs[layer]["weight_tensor_infos"][0][key]
            torch.testing.assert_close(torch.tensor(mine), torch.tensor(other), rtol=2e-6, atol=0)
    assert {parent for parent, infos in json.loads((tmp_path / "out.json").read_text()).items() if infos} == {
        *(f"model:layers:{i}:{part}" for i in range(2) for part in ("attn", "mlp")),
        " ",
    }


def _ops(document):
    return ((op["fqn"], op) for infos in document.values() for op in infos["q_op_infos"].values())


@pytest.mark.parametrize(("name", "mapping"), [("static", smooth), ("smoothquant", static)])
def test_a_file_of_one_kind_loads_into_a_model_prepared_for_the_other(two_blocks, tmp_path, name, mapping):
    model, batches = two_blocks
    prepared = prepare(model, mapping(), example_inputs=batches[0])
    prepared.load_qconf_summary(DATA / f"ipex_qconf_{name}.json")
    expected = model(batches[0])
    assert (convert(prepared)(batches[0]) - expected).norm() / expected.norm() < 0.02
    prepared(batches[0])
    recalibrated = written(prepared, tmp_path / "out.json")
    again = prepare(model, mapping(), example_inputs=batches[0])
    again.load_qconf_summary(tmp_path / "out.json")
    assert written(again, tmp_path / "again.json") == recalibrated
    assert torch.equal(convert(again)(batches[0]), convert(prepared)(batches[0]))


# ---------------------------------------------------------------------------------------------------------- round trips
@pytest.mark.parametrize("mapping", [smooth, static, lambda: smooth(share_weight_observers=False)])
def test_save_load_save_is_identical_and_converts_to_the_same(model, tmp_path, mapping):
    first = prepared_for(model, mapping())
    first.save_qconf_summary(tmp_path / "one.json")
    second = prepared_for(model, mapping(), calibrate=False)
    second.load_qconf_summary(tmp_path / "one.json")
    second.save_qconf_summary(tmp_path / "two.json")
    assert (tmp_path / "one.json").read_text() == (tmp_path / "two.json").read_text()
    assert torch.equal(convert(first)(X), convert(second)(X))


@pytest.mark.parametrize("mapping", [smooth, static])
def test_assigned_parameters_are_saved_as_observed_ones(model, tmp_path, mapping):
    calibrated = prepared_for(model, mapping())
    calibrated.save_qconf_summary(tmp_path / "observed.json")
    assigned = prepared_for(model, mapping(), calibrate=False)
    for seen, group in zip(observed(calibrated).groups, observed(assigned).groups, strict=True):
        for layer, parameters in zip(group.layers, group_parameters(calibrated, seen), strict=True):
            layer.parameters, layer.quantized = parameters, layer.name != "layers.0.k"
    expected = json.loads((tmp_path / "observed.json").read_text())
    edited(expected, "layers.0.k", inf_dtype="torch.float32", force_dtype="torch.float32")
    document = written(assigned, tmp_path / "assigned.json")
    op = next(op for infos in document.values() for op in infos["q_op_infos"].values() if op["fqn"] == "layers.0.k")
    assert op["weight_tensor_infos"][0]["inf_dtype"] == "torch.float32"
    op["weight_tensor_infos"][0]["inf_dtype"] = "torch.qint8"
    assert document == expected
    loaded = prepared_for(model, mapping(), calibrate=False)
    loaded.load_qconf_summary(tmp_path / "assigned.json")
    converted = convert(assigned)
    assert type(converted.layers[0].k) is nn.Linear
    assert torch.equal(converted(X), convert(loaded)(X))


def test_lists_are_read_as_well_as_lists_by_layer(attention, tmp_path):
    document = json.loads((DATA / "ipex_qconf_shared.json").read_text())
    for op in document[" "]["q_op_infos"].values():
        for info in op["input_tensor_infos"]:
            for key in ("scale", "zero_point", "smooth_quant_scaling_factor"):
                if isinstance(info.get(key), dict):
                    info[key] = next(iter(info[key].values()))
    (tmp_path / "lists.json").write_text(json.dumps(document))
    results = []
    for file in (DATA / "ipex_qconf_shared.json", tmp_path / "lists.json"):
        prepared = prepared_for(attention, smooth(), calibrate=False)
        prepared.load_qconf_summary(file)
        results.append(convert(prepared)(X))
    assert torch.equal(*results)


def test_ops_are_indexed_by_parent(model, tmp_path):
    document = written(prepared_for(model, static()), tmp_path / "out.json")
    ops = {parent: [op["fqn"] for op in infos["q_op_infos"].values()] for parent, infos in document.items()}
    names = ["q", "k", "o"]
    assert sorted(ops.values()) == sorted([["head"], *([f"layers.{i}.{n}" for n in names] for i in range(2))])
    for infos in document.values():
        assert list(infos["q_op_infos"]) == [str(i) for i in range(len(infos["q_op_infos"]))]
    info = document[" "]["q_op_infos"]["0"]["input_tensor_infos"][0]
    assert isinstance(info["scale"], list)
    assert "smooth_quant_scaling_factor" not in info


# ---------------------------------------------------------------------------------------------------------------- edits
def edited(document, name, **changes):
    for infos in document.values():
        for op in infos["q_op_infos"].values():
            if op["fqn"] == name:
                op["input_tensor_infos"][0].update(changes)
                return
    raise AssertionError(name)


def test_force_dtype_switches_a_layer_between_int8_and_float(model, tmp_path):
    path = tmp_path / "q.json"
    document = written(prepared_for(model, smooth()), path)
    edited(document, "layers.0.k", inf_dtype="torch.float32", force_dtype="torch.float32")
    path.write_text(json.dumps(document))
    prepared = prepared_for(model, smooth(), calibrate=False)
    prepared.load_qconf_summary(path)
    converted = convert(prepared)
    assert type(converted.layers[0].k) is nn.Linear
    assert type(converted.layers[0].q) is type(converted.layers[1].k) is Int8Linear
    assert (
        "summary leaves it in float" in next(r for r in ipex.explain(converted).rows if r.module == "layers.0.k").reason
    )

    again = written(prepared, tmp_path / "again.json")
    assert again == document
    edited(again, "layers.0.k", force_dtype="torch.quint8")
    path.write_text(json.dumps(again))
    prepared.load_qconf_summary(path)
    assert type(convert(prepared).layers[0].k) is Int8Linear


def test_a_summary_with_everything_in_float_gives_the_float_model(attention, tmp_path):
    path = tmp_path / "q.json"
    document = written(prepared_for(attention, smooth()), path)
    for name in "qko":
        edited(document, name, force_dtype="torch.float32")
    path.write_text(json.dumps(document))
    prepared = prepared_for(attention, smooth(), calibrate=False)
    prepared.load_qconf_summary(path)
    with pytest.warns(UserWarning, match="the qconf summary leaves it in float"):
        convert(prepared)


# --------------------------------------------------------------------------------------------------------------- errors
def test_a_missing_file_or_name(attention, tmp_path):
    prepared = prepared_for(attention, smooth())
    with pytest.raises(OSError, match="nowhere"):
        prepared.load_qconf_summary(tmp_path / "nowhere.json")
    with pytest.raises(ValueError, match="A configure file name should be given"):
        prepared.save_qconf_summary(None)
    with pytest.raises(OSError, match="nowhere"):
        prepared.save_qconf_summary(tmp_path / "nowhere" / "q.json")
    assert list(tmp_path.iterdir()) == []


def test_dynamic_quantization_has_no_summary(attention, tmp_path):
    prepared = prepare(attention, ipex.quantization.default_dynamic_qconfig_mapping)
    with pytest.raises(RuntimeError, match="dynamic quantization has nothing to save"):
        prepared.save_qconf_summary(tmp_path / "q.json")


def test_another_topology_is_refused_and_changes_nothing(model, attention, tmp_path):
    path = tmp_path / "q.json"
    prepared_for(model, smooth()).save_qconf_summary(path)
    prepared = prepared_for(attention, smooth())
    before = written(prepared, tmp_path / "before.json")
    with pytest.raises(ValueError, match=r"lacks the layers \['k', 'o', 'q'\] and has \['head'.*that the model lacks"):
        prepared.load_qconf_summary(path)
    assert written(prepared, tmp_path / "after.json") == before

    wider = Model().eval()
    wider.head = nn.Linear(4, 8)
    with pytest.raises(ValueError, match="head: scale of the weight: expected 8 positive, finite values"):
        prepared_for(wider, smooth()).load_qconf_summary(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": {"0_0": [0.0]}}, "scale: expected a finite number above 0"),
        ({"scale": {"0_0": [float("nan")]}}, "scale: expected a finite number above 0"),
        ({"scale": {"0_0": ["1"]}}, "expected a scale and a whole zero point"),
        ({"scale": {"0_0": []}}, "malformed"),
        ({"scale": {"0_0": [True]}}, "expected a scale and a whole zero point, got True"),
        ({"scale": {"0_0": [10**400]}}, "expected a scale and a whole zero point"),
        ({"zero_point": {}}, "malformed"),
        ({"zero_point": {"0_0": [True]}}, "expected a scale and a whole zero point"),
        ({"smooth_quant_scaling_factor": {"0_0": [1.0, True, 1.0, 1.0]}}, "smoothing factor: expected 4 positive"),
        ({"smooth_quant_scaling_factor": {"0_0": "abcd"}}, "malformed"),
        ({"scale": 3}, "malformed"),
        ({"zero_point": {"0_0": [256]}}, r"zero_point: expected 0\.\.255"),
        ({"zero_point": {"0_0": [1.5]}}, "expected a scale and a whole zero point"),
        ({"smooth_quant_scaling_factor": {"0_0": [1.0, 1.0]}}, "smoothing factor: expected 4 positive"),
        ({"smooth_quant_scaling_factor": {"0_0": [1.0, -1.0, 1.0, 1.0]}}, "smoothing factor: expected 4 positive"),
        ({"force_dtype": "torch.int8"}, "force_dtype: expected"),
        ({"force_dtype": None}, "malformed"),
    ],
)
def test_entries_that_make_no_sense(attention, tmp_path, changes, message):
    path = tmp_path / "q.json"
    document = written(prepared_for(attention, smooth()), path)
    edited(document, "q", **changes)
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=f"qconf summary: q: .*{message}"):
        prepared_for(attention, smooth()).load_qconf_summary(path)


def test_long_values_are_not_shown_whole(attention, tmp_path):
    path = tmp_path / "q.json"
    document = written(prepared_for(attention, smooth()), path)
    edited(document, "q", smooth_quant_scaling_factor={"0_0": [-1.0] * 100000})
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match="smoothing factor: expected 4 positive") as raised:
        prepared_for(attention, smooth()).load_qconf_summary(path)
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize("inputs", [None, [], [{}], [None]])
def test_entries_without_an_input_tensor(attention, tmp_path, inputs):
    path = tmp_path / "q.json"
    document = written(prepared_for(attention, smooth()), path)
    document[" "]["q_op_infos"]["0"]["input_tensor_infos"] = inputs
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match="qconf summary: q: its entry is malformed"):
        prepare_with_summary(attention, smooth(), path, None, False)


def test_a_layer_that_was_called_twice_is_in_one_group(attention, tmp_path):
    path = tmp_path / "q.json"
    document = written(prepared_for(attention, smooth()), path)
    ops = document[" "]["q_op_infos"]
    ops["3"] = copy.deepcopy(ops["0"])
    ops["3"]["input_tensor_infos"][0]["id"] = 99
    path.write_text(json.dumps(document))
    prepared = prepare_with_summary(attention, smooth(), path, None, False)
    assert sorted(layer.name for group in observed(prepared).groups for layer in group.layers) == ["k", "o", "q"]


@pytest.mark.parametrize("without", ["q", "k"])
def test_a_layer_that_the_file_has_no_scale_for_does_not_keep_its_siblings_in_float(attention, tmp_path, without):
    path = tmp_path / "q.json"
    document = written(prepared_for(attention, smooth()), path)
    edited(document, without, scale=None)
    path.write_text(json.dumps(document))
    prepared = prepared_for(attention, smooth(), calibrate=False)
    prepared.load_qconf_summary(path)
    with pytest.warns(UserWarning, match=f"never reached 1 layers, which stay in float: {without}"):
        converted = convert(prepared)
    floats = [name for name in "qko" if type(converted.get_submodule(name)) is nn.Linear]
    assert floats == [without]


def test_signed_codes_of_a_smoothed_layer_survive_calibrating_again(attention, tmp_path):
    path = tmp_path / "q.json"
    document = written(prepared_for(attention, smooth()), path)
    for name in "qk":
        op = next(op for op in document[" "]["q_op_infos"].values() if op["fqn"] == name)
        ((key, (zero_point,)),) = op["input_tensor_infos"][0]["zero_point"].items()
        edited(document, name, force_dtype="torch.qint8", zero_point={key: [zero_point - 128]})
    path.write_text(json.dumps(document))
    prepared = prepared_for(attention, smooth(), calibrate=False)
    prepared.load_qconf_summary(path)
    loaded = convert(prepared)
    prepared(X)
    assert written(prepared, path) == document
    assert torch.equal(convert(prepared)(X), loaded(X))


def test_the_file_has_the_permissions_of_a_new_file(attention, tmp_path):
    written(prepared_for(attention, smooth()), tmp_path / "q.json")
    (tmp_path / "other").touch()
    assert (tmp_path / "q.json").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("text", ["", "[]", "3", '{"a": 1}', '{" ": {"q_op_infos": {"0": {}}}}', "{"])
def test_files_that_are_no_summary(attention, tmp_path, text):
    path = tmp_path / "q.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"q\.json: not a qconf summary"):
        prepared_for(attention, smooth()).load_qconf_summary(path)
