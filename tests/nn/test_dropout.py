import torch
from torch import nn

from ipex_quant.nn.dropout import replace_dropout_with_identity


class Noise(nn.Dropout):
    pass


def test_dropouts_in_evaluation_mode_become_identities_that_keep_p():
    model = nn.Sequential(nn.Dropout(0.3), nn.Sequential(nn.Dropout2d(0.1)), Noise(0.2), nn.Dropout(0.4)).eval()
    model[3].train()
    assert replace_dropout_with_identity(model) is model
    assert [type(module) for module in model] == [nn.Identity, nn.Sequential, Noise, nn.Dropout]
    assert type(model[1][0]) is nn.Identity
    assert (model[0].p, model[1][0].p) == (0.3, 0.1)
    assert not model[0].training


def test_for_training_all_become_identities_without_p():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Dropout2d(0.1), Noise(0.2)).train()
    model[3].eval()
    replace_dropout_with_identity(model, for_training=True)
    assert [type(module) for module in model] == [nn.Linear, nn.Identity, nn.Identity, Noise]
    assert model[1].p == model[2].p == 0.0
    assert model[1].training
    x = torch.randn(3, 4)
    assert torch.equal(model(x), model[0](x))


def test_a_model_that_is_a_dropout_stays():
    assert type(replace_dropout_with_identity(nn.Dropout().eval())) is nn.Dropout
