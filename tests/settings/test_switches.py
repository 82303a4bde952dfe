import logging

import pytest
import torch
from torch import nn

import ipex_quant as ipex
from ipex_quant.nn import memory_format

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return torch.relu(self.linear(torch.relu(self.conv(x)).mean((2, 3))))


def test_traced_graphs_are_fused():
    model = Small().eval()
    try:
        assert ipex.enable_onednn_fusion(True) is None
        assert torch.jit.onednn_fusion_enabled()
        with torch.no_grad():
            traced = torch.jit.freeze(torch.jit.trace(model, X))
            for _ in range(3):
                torch.testing.assert_close(traced(X), model(X))
        assert "oneDNNFusionGroup" in str(traced.graph_for(X))
    finally:
        ipex.enable_onednn_fusion(False)
    assert not torch.jit.onednn_fusion_enabled()


def test_auto_channels_last(monkeypatch):
    monkeypatch.setattr(memory_format._Setting, "automatic", None)  # restores it in the end
    for switch, expected in ((ipex.disable_auto_channels_last, False), (ipex.enable_auto_channels_last, True)):
        switch()
        weight = ipex.optimize(nn.Conv2d(3, 4, 3).eval()).weight
        assert weight.is_contiguous(memory_format=torch.channels_last) == expected


@pytest.mark.parametrize(("arguments", "level"), [((logging.INFO,), 20), ((), 30), (("ERROR",), 40)])
def test_the_level_of_the_log(arguments, level):
    logger = logging.getLogger("ipex_quant")
    before = logger.level
    try:
        ipex.set_logging_level(*arguments)
        assert logger.level == level
        with pytest.raises(ValueError, match="Unknown level"):
            ipex.set_logging_level("LOUD")
    finally:
        logger.setLevel(before)
