"""What fused layers read from the keywords of the layers that they replace."""

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

from ipex_quant.llm.decoder.call import CallReader, LayerCall
from ipex_quant.llm.decoder.families import FAMILIES

X = torch.zeros(1)


def read(layer, **given):
    return CallReader(FAMILIES[layer][0])(given)


def values(call):
    return {name: getattr(call, name) for name in LayerCall.__slots__ if getattr(call, name) is not None}


def test_nothing_given_is_nothing():
    assert not values(read("LlamaDecoderLayer", use_cache=True, attention_mask=None))


@pytest.mark.parametrize(
    ("layer", "keyword"),
    [("LlamaDecoderLayer", "past_key_values"), ("LlamaDecoderLayer", "cache"), ("BloomBlock", "layer_past")],
)
def test_caches_have_three_keywords(layer, keyword):
    cache = DynamicCache()
    assert values(read(layer, **{keyword: cache})) == {"cache": cache, "caches": cache}


def test_decoders_with_an_encoder_keep_a_cache_of_their_own():
    own, other = DynamicCache(), DynamicCache()
    caches, keywords = EncoderDecoderCache(own, other), {"encoder_hidden_states": X, "encoder_attention_mask": X}
    expected = {"cache": own, "caches": caches, "encoder_states": X, "encoder_mask": X}
    assert values(read("BartDecoderLayer", past_key_values=caches, **keywords)) == expected


@pytest.mark.parametrize(("layer", "expected"), [("MptBlock", [False, True]), ("BloomBlock", [True, False])])
def test_masks_are_true_where_attention_goes(layer, expected):
    assert read(layer, attention_mask=torch.tensor([True, False])).mask.tolist() == expected


def test_values_that_mean_nothing_here_are_not_ignored():
    assert read("LlamaDecoderLayer", output_attentions=False, encoder_hidden_states=None) is not None
    assert read("LlamaDecoderLayer", output_attentions=True) is None
    assert read("LlamaDecoderLayer", encoder_hidden_states=X) is None


def test_no_attribute_can_be_misspelled():
    with pytest.raises(AttributeError):
        LayerCall().masks = X
