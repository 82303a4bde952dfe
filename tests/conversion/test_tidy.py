import pytest
import torch
from torch import nn

from ipex_quant.conversion.example import Example
from ipex_quant.conversion.tidy import fold_batch_norms, leave_fast_paths


class Net(nn.Module):
    def __init__(self, reads_twice=False):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.head, self.head_norm = nn.Linear(4, 5), nn.BatchNorm1d(5)
        self.reads_twice = reads_twice

    def forward(self, x):
        features = self.conv(x)
        y = self.norm(features)
        if self.reads_twice:
            y = y + features
        return self.head_norm(self.head(y.mean((2, 3))))


def trained(model):
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight)
    return model.eval()


@pytest.mark.parametrize("reads_twice", [False, True])
def test_a_batch_norm_is_folded_where_only_it_reads_the_layer(reads_twice):
    model, x = trained(Net(reads_twice)), torch.randn(2, 3, 4, 4)
    expected = model(x)
    fold_batch_norms(model, ["conv", "head"], Example((x,)))
    assert isinstance(model.norm, nn.Identity) is not reads_twice
    assert isinstance(model.head_norm, nn.Identity)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_what_is_not_among_the_layers_or_trains_stays():
    model, x = trained(Net()), torch.randn(2, 3, 4, 4)
    model.head_norm.train()
    fold_batch_norms(model, ["head"], Example((x,)))
    assert isinstance(model.norm, nn.BatchNorm2d)
    assert isinstance(model.head_norm, nn.BatchNorm1d)


def test_channels_of_a_linear_layers_output_of_three_dimensions_are_not_its_features():
    model, x = trained(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(3))), torch.randn(2, 3, 4)
    fold_batch_norms(model, ["0"], Example((x,)))
    assert isinstance(model[1], nn.BatchNorm1d)


def test_a_layer_that_has_two_names_is_folded_in_both():
    model = trained(nn.ModuleDict({"a": nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))}))
    model["b"] = model["a"]
    model.forward = lambda x: model["a"](x)
    x = torch.randn(3, 4)
    expected = model(x)
    fold_batch_norms(model, ["a.0"], Example((x,)))
    assert model["a"][0] is model["b"][0]
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_an_encoder_layer_calls_the_layers_to_quantize():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="relu")
    encoder = nn.TransformerEncoder(layer, 2).eval()
    calls = []
    encoder.layers[0].linear1.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(2, 3, 8)
    leave_fast_paths(encoder, ["layers.0.linear1"])
    assert (encoder.layers[0].activation_relu_or_gelu, encoder.layers[1].activation_relu_or_gelu) == (0, 1)
    assert not encoder.use_nested_tensor
    with torch.no_grad():
        encoder(x)
    assert calls == [1]
