import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from ipex_quant.nn.embeddings import RowFactor, ScaledEmbedding, embedding_obstacle, is_embedding, row_factor


class Scaled(nn.Embedding):
    scale = 640**0.5

    def forward(self, ids):
        return super().forward(ids) * self.scale


class Normed(nn.Embedding):
    def forward(self, ids):
        return F.normalize(super().forward(ids), dim=-1)


class Positions(nn.Embedding):
    """As OPT has it: an offset, and ids from a mask."""

    def forward(self, mask):
        return super().forward(mask.cumsum(1) % self.num_embeddings)


class WithoutPadding(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids).masked_fill((ids == self.padding_idx).unsqueeze(-1), 0)


def gemma():
    kind = transformers.models.gemma3.modeling_gemma3.Gemma3TextScaledWordEmbedding
    return kind(10, 8, 0, embed_scale=640**0.5)


def bart():
    return transformers.models.bart.modeling_bart.BartScaledWordEmbedding(10, 8, 1, embed_scale=640**0.5)


def test_a_plain_embedding_has_the_factor_one():
    assert row_factor(nn.Embedding(4, 4)) == RowFactor(1.0, False)


@pytest.mark.parametrize(("make", "rounded"), [(lambda: Scaled(10, 8), False), (bart, False), (gemma, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_factor_of_a_scaled_embedding_is_found_by_trying_it(make, rounded, dtype):
    module = make().to(dtype)
    before = module.weight.clone()
    factor = row_factor(module)
    if dtype == torch.float32:  # in others a factor that is a buffer was rounded with the weight
        assert factor.value == pytest.approx(640**0.5, rel=1e-7)
        assert factor.rounded == rounded
    ids = torch.arange(10).reshape(2, 5)
    assert torch.equal(factor.apply(F.embedding(ids, module.weight)), module(ids))
    assert torch.equal(module.weight, before)
    assert (module.num_embeddings, module.embedding_dim) == (10, 8)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Normed(10, 8), "Normed does not just look up rows"),
        (Positions(10, 8), "Positions does not just look up rows"),
        (WithoutPadding(10, 8, padding_idx=2), "WithoutPadding does not just look up rows"),
        (nn.Embedding(10, 8, max_norm=1.0), "max_norm"),
        (nn.Embedding(10, 8, sparse=True), "made to be trained"),
        (nn.Embedding(10, 8, scale_grad_by_freq=True), "made to be trained"),
        (nn.Embedding(10, 8, dtype=torch.float64), "its weight is torch.float64"),
        (nn.Embedding(10, 8, device="meta"), "its weight is on device meta"),
    ],
)
def test_what_else_they_do_is_a_reason_to_stay_in_float(module, reason):
    assert reason in embedding_obstacle(module)


def test_weights_need_not_be_read():
    assert embedding_obstacle(nn.Embedding(4, 4, device="meta"), read_weights=False) is None


def test_position_tables_of_transformers_are_no_plain_embeddings():
    opt = transformers.models.opt.modeling_opt.OPTLearnedPositionalEmbedding(64, 8)
    assert row_factor(opt) is None


def test_a_scaled_embedding_multiplies():
    module = ScaledEmbedding(4, 4)
    module.factor = RowFactor(2.5)
    ids = torch.tensor([1, 3])
    assert torch.equal(module(ids), module.weight[ids] * 2.5)
    assert row_factor(module) == RowFactor(2.5)
    assert is_embedding(module)
    assert not is_embedding(nn.Linear(2, 2))
