"""`ipex_quant.optimize` for inference against stock models, in interleaved rounds of one run.

BERT is transformers' BERT-base shape, ResNet-50 is in channels last with its BatchNorms folded by torch, and the LSTM
has two layers in both directions; all have random weights. A ratio is stock seconds over optimized seconds within a
round, and the figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from machine import describe
from rounds import mean_seconds, merge_json
from torch import nn
from torch.fx.experimental.optimization import fuse
from transformers import BertConfig, BertModel

import ipex_quant as ipex

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Bottleneck(nn.Module):
    """Three convolutions and a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.body = nn.Sequential(
            *_unit(inputs, width, 1, 1),
            nn.ReLU(),
            *_unit(width, width, 3, stride),
            nn.ReLU(),
            *_unit(width, outputs, 1, 1),
        )
        shape_stays = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if shape_stays else nn.Sequential(*_unit(inputs, outputs, 1, stride))
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.body(x) + self.shortcut(x))


def _unit(inputs: int, outputs: int, kernel: int, stride: int) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs)


def resnet50() -> nn.Module:
    """The layers of ResNet-50 (He et al., 2015, with the stride in the middle convolution)."""
    layers: list[nn.Module] = [*_unit(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for number in range(count):
            layers.append(Bottleneck(inputs, width, stride if number == 0 else 1))
            inputs = 4 * width
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


Call = Callable[[], object]


def bert(dtype: torch.dtype, batch: int, length: int) -> tuple[Call, Call]:
    """Calls of the stock and of the optimized model."""
    model = BertModel(BertConfig()).eval()
    inputs = {
        "input_ids": torch.randint(0, 30000, (batch, length)),
        "attention_mask": torch.ones(batch, length, dtype=torch.long),
    }
    stock = copy.deepcopy(model).to(dtype)
    optimized = ipex.optimize(model, dtype=dtype, inplace=True)
    return lambda: stock(**inputs), lambda: optimized(**inputs)


def resnet(dtype: torch.dtype, batch: int, size: int) -> tuple[Call, Call]:
    """Calls of the stock and of the optimized model."""
    model = resnet50()
    image = torch.randn(batch, 3, size, size).to(dtype, memory_format=torch.channels_last)
    stock = fuse(model).to(memory_format=torch.channels_last).to(dtype)
    optimized = ipex.optimize(model, dtype=dtype, inplace=True)
    return lambda: stock(image), lambda: optimized(image)


def lstm(dtype: torch.dtype, batch: int, length: int) -> tuple[Call, Call]:
    """Calls of the stock and of the optimized model."""
    model = nn.LSTM(256, 256, 2, bidirectional=True).eval()
    x = torch.randn(length, batch, 256).to(dtype)
    stock = copy.deepcopy(model).to(dtype)
    optimized = ipex.optimize(model, dtype=dtype, inplace=True)
    return lambda: stock(x), lambda: optimized(x)


CASES = {
    "bert": (bert, ((8, 128), (1, 128), (1, 16))),
    "resnet50": (resnet, ((8, 224), (1, 224))),
    "lstm": (lstm, ((8, 50),)),
}
"""Models by name: how they are made, and the batch sizes with lengths, or heights and widths, of inputs."""


def measure(name: str, dtype: str, shape: tuple[int, int], rounds: int) -> dict:
    """One record; rounds last about half a second or one call."""
    stock, optimized = CASES[name][0](DTYPES[dtype], *shape)
    with torch.inference_mode():
        for _ in range(2):  # the second packs weights
            optimized()
        calls = max(1, int(0.5 / mean_seconds(optimized, 1)))
        samples = []
        for number in range(rounds):
            pair = [(stock, 1 if DTYPES[dtype] != torch.float32 else calls), (optimized, calls)]
            times = [mean_seconds(*each) for each in (pair if number % 2 else pair[::-1])]
            samples.append(times if number % 2 else times[::-1])
    ratios = [a / b for a, b in samples]
    return {
        "model": name,
        "dtype": dtype,
        "batch": shape[0],
        "size": shape[1],
        "stock_seconds": statistics.median(a for a, _ in samples),
        "optimized_seconds": statistics.median(b for _, b in samples),
        "over_stock": statistics.median(ratios),
        "range": [min(ratios), max(ratios)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--shapes", type=int, help="only the first SHAPES shapes of each model")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="where to write the records; others that the file has stay")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    machine = describe(args.threads)
    records = []
    print(
        f"\n{'model':10s}{'dtype':>10s}{'batch':>7s}{'size':>6s}{'stock ms':>11s}{'ours ms':>11s}{'ratio':>8s}  range"
    )
    for name in args.models:
        for dtype in args.dtypes:
            for shape in CASES[name][1][: args.shapes]:
                r = measure(name, dtype, shape, args.rounds)
                records.append(r)
                print(
                    f"{name:10s}{dtype:>10s}{shape[0]:>7d}{shape[1]:>6d}{r['stock_seconds'] * 1e3:>11.2f}"
                    f"{r['optimized_seconds'] * 1e3:>11.2f}{r['over_stock']:>8.2f}  "
                    f"{r['range'][0]:.2f} to {r['range'][1]:.2f}",
                    flush=True,
                )
    if args.json:
        merge_json(args.json, machine, "inference", records, ("model", "dtype", "batch", "size"))


if __name__ == "__main__":
    main()
