"""Streams of one thread each against one stream of all threads, the model as it is, on small batches.

A round times each of them once, one after the other; ratios are taken within a round, and the figures are medians over
the rounds. Every model runs eagerly and as a frozen trace: eager streams share Python's lock.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from machine import describe
from rounds import mean_seconds, write_json
from torch import nn
from transformers import BertConfig, BertModel

from ipex_quant import ops
from ipex_quant.cpu.runtime import CPUPool, MultiStreamModule
from ipex_quant.nn import WeightOnlyQuantizedLinear
from ipex_quant.numerics.scheme import WeightScheme, WoqWeightDtype

BATCHES = (2, 4, 8)
CALL_SECONDS = 0.3


class Residual(nn.Module):
    """Two convolutions with batch norm beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def residual_net(batch: int) -> tuple[nn.Module, torch.Tensor]:
    """ResNet-18's widths at half the depth, on images of 64 x 64, channels last."""
    sizes = [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]
    model = nn.Sequential(
        nn.Conv2d(3, 64, 7, 2, 3),
        nn.ReLU(),
        *(Residual(*size) for size in sizes),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    x = torch.randn(batch, 3, 64, 64)
    return model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)


class Encoder(nn.Module):
    """A small BERT that returns a tensor."""

    def __init__(self) -> None:
        super().__init__()
        config = BertConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024)
        self.bert = BertModel(config)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.bert(ids, return_dict=False)[0]


def encoder(batch: int) -> tuple[nn.Module, torch.Tensor]:
    """BERT-mini, 32 tokens a row."""
    return Encoder(), torch.randint(0, 30000, (batch, 32))


def quantized_linears(batch: int) -> tuple[nn.Module, torch.Tensor]:
    """Twelve INT4 linears of 1024 x 1024, 16 rows a sample."""
    scheme = WeightScheme(WoqWeightDtype.INT4, True, 128)
    weights = [ops.quantize_weight(torch.randn(1024, 1024) * 0.03, scheme) for _ in range(12)]
    return nn.Sequential(*(WeightOnlyQuantizedLinear.from_quantized_weight(weight) for weight in weights)), torch.randn(
        batch, 16, 1024
    )


MODELS: dict[str, Callable[[int], tuple[nn.Module, torch.Tensor]]] = {
    "residual net": residual_net,
    "BERT-mini": encoder,
    "INT4 linears": quantized_linears,
}


def measure(model: nn.Module, x: torch.Tensor, streams: int, rounds: int) -> dict[str, float]:
    """Median seconds of a call of `model` as it is and in streams, and the median of their ratios."""
    runs = {"one": model, "streams": MultiStreamModule(model, streams, CPUPool(CPUPool().core_ids[:streams]))}
    for run in runs.values():
        for _ in range(3):
            run(x)
    calls = max(1, int(CALL_SECONDS / mean_seconds(partial(model, x), 1)))
    samples = [{name: mean_seconds(partial(run, x), calls) for name, run in runs.items()} for _ in range(rounds)]
    return {
        "one_stream_seconds": statistics.median(sample["one"] for sample in samples),
        "streams_seconds": statistics.median(sample["streams"] for sample in samples),
        "speedup": statistics.median(sample["one"] / sample["streams"] for sample in samples),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads, and streams")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="where to write the records")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    machine = describe(args.threads)
    records = []
    print(f"{'model':14s}{'mode':>8s}{'batch':>7s}{'one, ms':>10s}{'streams, ms':>13s}{'speedup':>9s}")
    with torch.inference_mode():
        for name in args.models:
            for batch in args.batches:
                model, x = MODELS[name](batch)
                model.eval()
                modes = {"eager": model}
                if name != "INT4 linears":
                    modes["traced"] = torch.jit.freeze(torch.jit.trace(model, x))
                for mode, run in modes.items():
                    record = {"model": name, "mode": mode, "batch": batch, "dtype": "float32"}
                    record |= measure(run, x, args.threads, args.rounds)
                    records.append(record)
                    one, streams = record["one_stream_seconds"] * 1e3, record["streams_seconds"] * 1e3
                    print(f"{name:14s}{mode:>8s}{batch:>7d}{one:>10.2f}{streams:>13.2f}{record['speedup']:>8.2f}x")
    if args.json:
        write_json(args.json, {"machine": machine, "streams": records})


if __name__ == "__main__":
    main()
