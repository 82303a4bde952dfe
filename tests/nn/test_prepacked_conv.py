import itertools

import pytest
import torch
from torch import nn

from ipex_quant.nn.prepacked import prepack
from ipex_quant.nn.prepacked_conv import PrepackedConv, PrepackedConvTranspose


def is_packed(layer):
    return layer.forward._weight._made is not None


def check(layer, forward, x, dtype=torch.float32):
    """`layer` computes as before, first with plain weights, then packed, then for another shape."""
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    with torch.no_grad():
        expected = layer(x)
        prepack(forward(layer.to(dtype)))
        results = [layer(x.to(dtype))]
        assert not is_packed(layer)
        results += [layer(x.to(dtype)), layer(x[:1].to(dtype)), layer(x.to(dtype))]
        assert is_packed(layer)
    for actual in results:
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.float(), expected[: len(actual)], rtol=tolerance, atol=tolerance)
    return results


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_convolutions(kind, groups):
    torch.manual_seed(0)
    rank = kind(1, 1, 1).weight.dim()
    for bias, stride, dilation, padding in itertools.product((True, False), (1, 2), (1, 2), (0, 1)):
        layer = kind(4, 8, 3, stride, padding, dilation, groups, bias)
        results = check(layer, PrepackedConv, torch.randn(2, 4, *(7,) * (rank - 2)))
        assert results[1].movedim(1, -1).is_contiguous()


@pytest.mark.parametrize("kind", [nn.ConvTranspose2d, nn.ConvTranspose3d])
@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions(kind, groups):
    torch.manual_seed(0)
    rank = kind(1, 1, 1).weight.dim()
    for bias, stride, dilation, padding in itertools.product((True, False), (1, 2), (1, 2), (0, 2)):
        layer = kind(4, 8, 3, stride, padding, stride - 1, groups, bias, dilation)
        assert PrepackedConvTranspose.suits(layer)
        check(layer, PrepackedConvTranspose, torch.randn(2, 4, *(7,) * (rank - 2)))


def test_layers_that_onednn_does_not_compute():
    assert not PrepackedConv.suits(nn.Conv2d(4, 4, 3, padding="same"))
    assert not PrepackedConv.suits(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"))
    assert not PrepackedConvTranspose.suits(nn.ConvTranspose2d(4, 4, 3, groups=4))
    assert not PrepackedConvTranspose.suits(nn.ConvTranspose2d(4, 4, 4, padding=1, output_padding=2, dilation=3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("layer", "forward"),
    [(nn.Conv2d(4, 6, 3), PrepackedConv), (nn.ConvTranspose2d(4, 6, 3), PrepackedConvTranspose)],
)
def test_lower_precision_and_autocast(layer, forward, dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 4, 9, 9)
    expected = layer.float()(x).detach()
    check(layer, forward, x, dtype)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled), torch.autocast("cpu", dtype):
            for size in (2, 1, 1):
                actual = layer(x[:size])
                assert actual.dtype == dtype
                torch.testing.assert_close(actual.float(), expected[:size], rtol=0.03, atol=0.03)


def test_shapes_that_alternate_are_not_packed_again_and_again():
    layer, made = nn.Conv2d(4, 6, 3), []
    prepack(PrepackedConv(layer))
    pack = layer.forward._pack
    layer.forward._pack = lambda *args: made.append(args[-1]) or pack(*args)
    with torch.no_grad():
        for size in (9, 9, 8, 9, 8, 9, 9, 7, 7, 9):
            layer(torch.randn(2, 4, size, size))
    assert [shape[-1] for shape in made] == [9, 7]


def test_unbatched_inputs_and_output_sizes_and_errors():
    conv, up = nn.Conv2d(4, 6, 3), nn.ConvTranspose2d(4, 6, 3, stride=2)
    x = torch.randn(4, 9, 9)
    with torch.no_grad():
        expected = conv(x), up(x.unsqueeze(0), output_size=[20, 20])
        prepack(PrepackedConv(conv))
        prepack(PrepackedConvTranspose(up))
        assert torch.equal(conv(x), expected[0])
        assert torch.equal(up(x.unsqueeze(0), output_size=[20, 20]), expected[1])
        for bad in (torch.randn(2, 5, 9, 9), torch.randn(2, 4, 2, 2), torch.randn(9), torch.randn(2, 4, 9, 9).double()):
            for _ in range(2):
                with pytest.raises(RuntimeError):
                    conv(bad)


def test_gradients():
    layer, x = nn.Conv2d(4, 6, 3), torch.randn(2, 4, 9, 9, requires_grad=True)
    layer(x).sum().backward()
    expected = x.grad, layer.weight.grad
    x.grad = layer.weight.grad = None
    prepack(PrepackedConv(layer))
    for _ in range(2):
        result = layer(x)
    result.sum().backward()
    torch.testing.assert_close((x.grad, layer.weight.grad), expected)
