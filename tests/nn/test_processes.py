import multiprocessing

import torch
from torch import nn

from ipex_quant import ops
from ipex_quant.nn import Int8Linear, WeightOnlyQuantizedLinear
from ipex_quant.numerics import affine
from ipex_quant.numerics.scheme import WeightScheme, WoqWeightDtype
from ipex_quant.ops.int8 import INT8_PER_CHANNEL

IN, OUT = 64, 48


def quantized_model():
    torch.manual_seed(0)
    int4 = WeightScheme(WoqWeightDtype.INT4, False, 32)
    weights = [torch.randn(OUT, IN) for _ in range(4)]
    woq = [
        WeightOnlyQuantizedLinear.from_quantized_weight(ops.quantize_weight(w, int4), torch.randn(OUT)) for w in weights
    ]
    int8 = Int8Linear.make_group(
        [affine.quantize(w, INT8_PER_CHANNEL) for w in weights[:2]], [None] * 2, None, torch.float32
    )
    return nn.ModuleList([*woq, *int8])


def results(model):
    x = torch.randn(3, IN, generator=torch.Generator().manual_seed(1))
    return torch.stack([module(x) for module in model])


def _send_results(model, queue):
    queue.put((results(model).numpy(), model[-1].share_group is model[-2].share_group))


def test_a_spawned_process_gets_the_model_in_shared_memory():
    model = quantized_model()
    expected = results(model)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_send_results, args=(model, queue))
    process.start()
    got, is_one_group = queue.get(timeout=120)
    process.join()
    assert torch.equal(torch.from_numpy(got), expected)
    assert is_one_group
    assert all(module._packed.is_shared() for module in model[:4])
    assert model[-1].share_group.packed.data.is_shared()
    assert torch.equal(results(model), expected)
