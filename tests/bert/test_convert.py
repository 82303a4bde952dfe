import copy

import pytest
import torch
import transformers
from torch import nn

import ipex_quant as ipex


class Wrapper(nn.Module):
    def __init__(self, bert):
        super().__init__()
        self.bert = bert
        self.head = nn.Linear(32, 2)

    def forward(self, **batch):
        return self.head(self.bert(**batch).pooler_output)


@torch.inference_mode()
def test_a_module_with_a_bert(small_model, batch):
    model = Wrapper(small_model()).eval()
    fast = ipex.fast_bert(model)
    assert type(fast) is Wrapper
    assert fast is not model
    torch.testing.assert_close(fast(**batch), model(**batch), rtol=1e-4, atol=1e-5)


def test_the_original_stays(small_model, batch):
    model = small_model()
    before = copy.deepcopy(model.state_dict())
    ipex.fast_bert(model, dtype=torch.bfloat16)
    torch.testing.assert_close(model.state_dict(), before)
    assert not any("forward" in vars(module) for module in model.modules())


def test_other_dtypes(small_model):
    for dtype in (torch.float16, torch.float64, None):
        with pytest.raises(ValueError, match="computes in torch"):
            ipex.fast_bert(small_model(), dtype=dtype)


def test_other_seeds(small_model):
    assert ipex.fast_bert(small_model(), seed="7")
    with pytest.raises(ValueError, match="seed"):
        ipex.fast_bert(small_model(), seed="seven")


def test_models_without_a_bert(small_model):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="Linear is no BertModel"):
        assert ipex.fast_bert(model) is model
    with pytest.warns(UserWarning, match="returned as it is"):
        assert ipex.fast_bert(model, optimizer=optimizer) == (model, optimizer)
    roberta = transformers.RobertaModel(transformers.RobertaConfig(**small_model().config.to_dict()))
    with pytest.warns(UserWarning, match="RobertaModel"):
        assert ipex.fast_bert(roberta) is roberta


def test_parts_of_other_classes(small_model):
    for path, match in [("embeddings", "BertEmbeddings"), ("encoder", "BertEncoder"), ("encoder.layer.1", "BertLayer")]:
        model = small_model()
        model.set_submodule(path, nn.Identity()) if "." not in path else model.encoder.layer.__setitem__(
            1, nn.Identity()
        )
        with pytest.raises(TypeError, match=match):
            ipex.fast_bert(model)

    class Other(transformers.BertModel):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    with pytest.raises(TypeError, match="got Other"):
        ipex.fast_bert(Other(small_model().config))


def test_after_another_optimization(small_model):
    model = small_model()
    quantized = ipex.llm.optimize(
        copy.deepcopy(model), quantization_config=ipex.quantization.get_weight_only_quant_qconfig_mapping()
    )
    with pytest.raises(RuntimeError, match="was optimized by ipex_quant before"):
        ipex.fast_bert(quantized)
    again = ipex.fast_bert(ipex.fast_bert(model, unpad=True), dtype=torch.bfloat16)
    assert again.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_after_optimize(dtype, small_model):
    """As IPEX's document says; also where modules still look as they did."""
    refused = pytest.raises(RuntimeError, match="was optimized by ipex_quant before")
    for options in ({}, {"dtype": torch.bfloat16, "weights_prepack": False}):
        with refused:
            ipex.fast_bert(ipex.optimize(small_model(), **options), dtype=dtype)
    model = small_model().train()
    optimized, optimizer = ipex.optimize(model, torch.bfloat16, torch.optim.AdamW(model.parameters()))
    with refused:
        ipex.fast_bert(optimized, dtype=dtype, optimizer=optimizer)
    with refused:
        ipex.fast_bert(optimized.eval(), dtype=dtype)


def test_after_training_in_another_dtype(small_model):
    model = small_model().train()
    fast, optimizer = ipex.fast_bert(model, torch.bfloat16, torch.optim.AdamW(model.parameters()))
    for arguments in ((torch.float32, optimizer), (torch.float32,)):
        with pytest.raises(RuntimeError, match="give it the original model"):
            ipex.fast_bert(fast, *arguments)
    again, _ = ipex.fast_bert(fast, torch.bfloat16, optimizer)
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_what_is_no_optimizer(small_model):
    with pytest.raises(TypeError, match=r"optimizer: expected a torch\.optim\.Optimizer, got str"):
        ipex.fast_bert(small_model().train(), optimizer="AdamW")


@torch.inference_mode()
def test_decoders_stay_stock(small_model, batch):
    for options in ({"is_decoder": True}, {"is_decoder": True, "add_cross_attention": True}):
        model = small_model("BertLMHeadModel", **options)
        with pytest.warns(UserWarning, match="keeps transformers' code"):
            fast = ipex.fast_bert(model)
        torch.testing.assert_close(fast(**batch).logits, model(**batch).logits)
