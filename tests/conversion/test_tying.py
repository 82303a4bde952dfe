import pytest
import torch
import transformers
from torch import nn

from ipex_quant.conversion.tying import _without, share_tables, tied_modules, untie
from ipex_quant.nn import QuantizedEmbedding, WeightOnlyQuantizedLinear
from ipex_quant.quantization import WoqWeightDtype, get_weight_only_quant_qconfig_mapping

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96, "intermediate_size": 96}
T5_SIZES = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 96}


def llama(tied=False):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied))


def t5():
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**T5_SIZES))


def test_ties_of_other_parameters_stay():
    ties = {"head.weight": "embed.weight", "decoder.embed.weight": "embed.weight"}
    assert _without(ties, {"head"}) == {"decoder.embed.weight": "embed.weight"}
    assert _without(ties, {"other"}) == ties


def test_a_quantized_source_hands_over_to_the_first_of_its_targets():
    ties = {"a.weight": "head.weight", "b.weight": "head.weight", "c.weight": "head.weight"}
    assert _without(ties, {"head"}) == {"b.weight": "a.weight", "c.weight": "a.weight"}
    assert _without({"a.weight": "head.weight"}, {"head"}) == {}


def test_only_what_is_quantized_is_untied():
    model = t5()
    untie(model, ["lm_head"])
    assert set(model.all_tied_weights_keys) == {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    assert set(model.get_expanded_tied_weights_keys()) == set(model.all_tied_weights_keys)
    assert type(model)._tied_weights_keys != model._tied_weights_keys
    assert t5().all_tied_weights_keys.keys() >= {"lm_head.weight"}


@pytest.mark.parametrize("tied", [False, True])
def test_nothing_quantized_changes_nothing(tied):
    model = llama(tied)
    before = dict(model.all_tied_weights_keys)
    untie(model, [])
    assert model.all_tied_weights_keys == before
    assert "_tied_weights_keys" not in vars(model)


def quantized_pair(*dtypes):
    torch.manual_seed(0)
    modules = nn.ModuleDict({"a": nn.Embedding(8, 16), "b": nn.Embedding(8, 16), "head": nn.Linear(16, 8)})
    for module in modules.values():
        module.weight = modules.a.weight
    assert tied_modules(modules, modules.keys()) == [["a", "b", "head"]]
    assert tied_modules(modules, ["a"]) == []
    for (name, module), dtype in zip(list(modules.items()), dtypes, strict=True):
        module.qconfig = get_weight_only_quant_qconfig_mapping(weight_dtype=dtype).global_qconfig
        kind = WeightOnlyQuantizedLinear if name == "head" else QuantizedEmbedding
        modules[name] = kind.from_float(module)
    return modules


def test_tables_with_the_same_codes_are_shared():
    modules = quantized_pair(*[WoqWeightDtype.INT8] * 3)
    share_tables(modules, [["a", "b", "head"]])
    assert modules.a.table is modules.b.table is modules.head


def test_tables_without_a_linear_layer_are_shared_by_embeddings():
    modules = quantized_pair(WoqWeightDtype.INT8, WoqWeightDtype.INT8, WoqWeightDtype.INT4)
    share_tables(modules, [["a", "b", "head"]])
    assert modules.a.table is modules.b.table is not modules.head
    assert (modules.a.tied, modules.b.tied) == (False, True)


def test_tables_with_other_codes_are_not_shared():
    modules = quantized_pair(WoqWeightDtype.INT8, WoqWeightDtype.INT4, WoqWeightDtype.NF4)
    share_tables(modules, [["a", "b", "head"]])
    assert not modules.a.tied
    assert not modules.b.tied
