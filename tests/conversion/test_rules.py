import pytest
import torch
from torch import nn

from ipex_quant.conversion.rules import choose_qconfigs
from ipex_quant.nn.multihead_attention import named_layers
from ipex_quant.quantization import WoqWeightDtype, get_weight_only_quant_qconfig_mapping, prepare


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 8)
        self.down = nn.Linear(8, 8)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 8)


ALL = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "head"]


@pytest.fixture
def mapping():
    return get_weight_only_quant_qconfig_mapping()


def int4():
    return get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT4).global_qconfig


def choice(mapping, model=None):
    chosen, reasons = choose_qconfigs(mapping, model or Model())
    names = [name for name, _ in named_layers(model or Model()) if name in {*chosen, *reasons}]
    return {name: chosen[name].weight_dtype.name if name in chosen else reasons[name] for name in names}


def test_the_global_rule_takes_every_linear(mapping):
    assert choice(mapping) == dict.fromkeys(ALL, "INT8")


def test_none_leaves_a_module_in_float(mapping):
    found = choice(mapping.set_module_name("head", None))
    assert found.pop("head") == "the mapping's set_module_name('head') is None"
    assert set(found.values()) == {"INT8"}


def test_a_name_covers_the_modules_inside(mapping):
    found = choice(mapping.set_module_name("blocks.1", None).set_module_name("blocks.1.up", int4()))
    assert found["blocks.1.up"] == "INT4"
    assert found["blocks.1.down"] == "the mapping's set_module_name('blocks.1') is None"
    assert found["blocks.0.up"] == "INT8"


def test_a_regex_matches_at_the_start_and_the_first_one_wins(mapping):
    mapping.set_module_name_regex(r"blocks\.\d+\.up", int4()).set_module_name_regex("blocks", None)
    mapping.set_module_name_regex("ead", None)
    found = choice(mapping)
    assert found["blocks.0.up"] == "INT4"
    assert "set_module_name_regex('blocks')" in found["blocks.0.down"]
    assert found["head"] == "INT8"


def test_a_type_covers_the_modules_inside(mapping):
    found = choice(mapping.set_object_type(Block, None))
    assert found["head"] == "INT8"
    assert found["blocks.0.up"] == "the mapping's set_object_type(Block) is None"
    assert set(choice(mapping.set_object_type(nn.Linear, int4())).values()) == {"INT4"}


def test_precedence_is_torchs(mapping):
    mapping.set_object_type(nn.Linear, None).set_module_name_regex(r"blocks\.0", int4())
    mapping.set_module_name("blocks.0.up", get_weight_only_quant_qconfig_mapping().global_qconfig)
    found = choice(mapping)
    assert found["blocks.0.up"] == "INT8"
    assert found["blocks.0.down"] == "INT4"
    assert found["head"] == "the mapping's set_object_type(Linear) is None"


def test_a_mapping_without_a_global_rule(mapping):
    found = choice(mapping.set_global(None).set_module_name("head", int4()))
    assert found["head"] == "INT4"
    assert found["blocks.0.up"] == "the mapping's set_global is None"


def test_obstacles_of_the_module_and_of_its_weight(mapping):
    model = Model()
    model.head.to(torch.float64)
    assert "float64" in choice(mapping, model)["head"]
    assert choose_qconfigs(mapping, model, read_weights=False)[1] == {}


class Attention(nn.MultiheadAttention):
    """Of the user's."""


def test_projections_of_attention_are_layers_that_rules_can_name(mapping):
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    names = [f"attention.{name}_proj" for name in ("q", "k", "v", "out")]
    assert choice(mapping, model) == dict.fromkeys(names, "INT8")
    found = choice(mapping.set_module_name("attention.k_proj", None).set_module_name_regex(".*out_proj", int4()), model)
    assert found.pop("attention.k_proj") == "the mapping's set_module_name('attention.k_proj') is None"
    assert list(found.values()) == ["INT8", "INT8", "INT4"]


@pytest.mark.parametrize("prepared", [False, True])
def test_a_rule_for_the_type_of_attention_covers_its_projections(mapping, prepared):
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    model = prepare(model, mapping) if prepared else model
    found = choice(mapping.set_object_type(nn.MultiheadAttention, None), model)
    assert set(found.values()) == {"the mapping's set_object_type(MultiheadAttention) is None"}


def test_attention_of_another_class_says_why_it_stays_in_float(mapping):
    found = choice(mapping, nn.ModuleDict({"attention": Attention(8, 2)}))
    assert "Attention is a class of its own" in found["attention"]
    assert "reads the weight" in found["attention.out_proj"]


def test_a_name_that_no_module_has_warns(mapping):
    with pytest.warns(UserWarning, match=r"the model has no module \['haed'\]"):
        choice(mapping.set_module_name("haed", None))


def test_a_configuration_of_an_unknown_kind_raises(mapping):
    with pytest.raises(TypeError, match=r"head: the mapping's set_module_name.*: expected a weight-only, .*got 8"):
        choice(mapping.set_module_name("head", 8))


def test_rules_that_are_not_supported_raise(mapping):
    with pytest.raises(ValueError, match="set_module_name_object_type_order is not supported"):
        choice(mapping.set_module_name_object_type_order("head", nn.Linear, 0, None))


class Scaled(nn.Embedding):
    pass


@pytest.fixture
def tables():
    return nn.ModuleDict(
        {
            "words": Scaled(64, 8),
            "others": nn.Embedding(32, 8),
            "places": nn.Embedding(31, 8),
            "inner": nn.ModuleDict({"words": nn.Embedding(64, 8)}),
            "head": nn.Linear(8, 8),
        }
    )


def test_embeddings_are_taken_by_no_rule_for_all_or_for_their_parents(mapping, tables):
    mapping.set_module_name("inner", int4()).set_object_type(nn.ModuleDict, int4())
    mapping.set_module_name_regex(".*", int4())
    assert choice(mapping, tables) == {"head": "INT4"}


def test_a_rule_for_their_type_takes_embeddings_that_are_not_small(mapping, tables):
    found = choice(mapping.set_object_type(nn.Embedding, int4()), tables)
    assert "rule for its type leaves out small tables" in found.pop("places")
    assert found == {"words": "INT4", "others": "INT4", "inner.words": "INT4", "head": "INT8"}


def test_rules_for_embeddings_have_an_order(mapping, tables):
    mapping.set_object_type(nn.Embedding, int4()).set_object_type(Scaled, mapping.global_qconfig)
    mapping.set_module_name("inner", None).set_module_name_regex("oth", None).set_module_name("places", int4())
    assert choice(mapping, tables) == {
        "words": "INT8",
        "places": "INT4",
        "head": "INT8",
    }
    mapping.set_module_name("words", None)
    assert "words" not in choice(mapping, tables)


def test_an_embedding_that_cannot_be_quantized_has_a_reason(mapping, tables):
    tables.words.max_norm = 1.0
    assert "max_norm" in choice(mapping.set_module_name("words", int4()), tables)["words"]


def test_rules_of_torchs_own_mappings_leave_embeddings_alone(tables):
    mapping = torch.ao.quantization.QConfigMapping()
    mapping.set_object_type(nn.Embedding, torch.ao.quantization.float_qparams_weight_only_qconfig)
    assert choose_qconfigs(mapping, tables)[0] == {}
