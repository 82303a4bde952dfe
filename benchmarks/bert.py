"""`ipex_quant.fast_bert` against stock transformers, in interleaved rounds of one run.

The model has BERT-base's shape with random weights, and a batch of 8 sequences of up to 128 tokens: all of 128
(`full`), or of 16, 32, ... 128 (`spread`), padded. Inference is that of ``BertModel``; a training step is forward,
backward and AdamW of ``BertForSequenceClassification`` with dropout. Stock bfloat16 is a model cast to bfloat16 for
inference, and autocast over float32 parameters for training. Ratios are stock seconds over fast seconds within a
round, and the figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from machine import describe
from rounds import mean_seconds, merge_json
from transformers import BertConfig, BertForSequenceClassification, BertModel

import ipex_quant as ipex

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LENGTHS = {"full": [128] * 8, "spread": list(range(16, 129, 16))}
KEYS = ("task", "dtype", "lengths", "unpad")

Call = Callable[[], object]


def batch_of(lengths: list[int]) -> dict[str, torch.Tensor]:
    """Random tokens of sequences of these `lengths`, padded on the right."""
    size = len(lengths), max(lengths)
    mask = (torch.arange(size[1]) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": torch.randint(1000, 30000, size) * mask, "attention_mask": mask}


def inference(batch: dict[str, torch.Tensor], dtype: torch.dtype, unpad: bool | None) -> Call:
    """A call of ``BertModel`` in `dtype`: of the stock one, or of a fast one with `unpad`."""
    torch.manual_seed(0)
    model = BertModel(BertConfig()).eval()
    model = model.to(dtype) if unpad is None else ipex.fast_bert(model, dtype=dtype, unpad=unpad)

    def call() -> None:
        with torch.inference_mode():
            model(**batch)

    return call


def training(batch: dict[str, torch.Tensor], dtype: torch.dtype, unpad: bool | None) -> Call:
    """A training step in `dtype`: of the stock model, or of a fast one with `unpad`."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    if unpad is not None:
        model, optimizer = ipex.fast_bert(model, dtype=dtype, optimizer=optimizer, unpad=unpad)
    labels = torch.arange(len(batch["input_ids"])) % 2

    def call() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()

    return call


TASKS = {"inference": inference, "training": training}


def measure(task: str, dtype: str, lengths: str, rounds: int) -> list[dict]:
    """Records without and with `unpad`; a round times every model once, in alternating order.

    A stock model in bfloat16 that takes more than three seconds, as on CPUs without instructions for it, is timed in
    its first call only.
    """
    batch = batch_of(LENGTHS[lengths])
    make = TASKS[task]
    calls = {"stock": make(batch, DTYPES[dtype], None)}
    if dtype != "float32":
        calls["stock float32"] = make(batch, torch.float32, None)
    calls |= {f"unpad {unpad}": make(batch, DTYPES[dtype], unpad) for unpad in (False, True)}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    first = {name: mean_seconds(call, 1) for name, call in calls.items()}
    if dtype != "float32" and first["stock"] > 3:
        del calls["stock"]
        samples["stock"] = [first["stock"]] * rounds
    for number in range(rounds):
        for name, call in list(calls.items())[:: -1 if number % 2 else 1]:
            samples[name].append(mean_seconds(call, 1))
    return [
        {"task": task, "dtype": dtype, "lengths": lengths, "unpad": unpad, **compare(samples, f"unpad {unpad}")}
        for unpad in (False, True)
    ]


def compare(samples: dict[str, list[float]], name: str) -> dict:
    """Seconds and ratios of the model called `name` in the seconds of all models, round by round."""
    ours = samples[name]

    def ratios(stock: str) -> list[float]:
        return [a / b for a, b in zip(samples[stock], ours, strict=True)]

    return {
        "stock_seconds": statistics.median(samples["stock"]),
        "fast_seconds": statistics.median(ours),
        "over_stock": statistics.median(ratios("stock")),
        "range": [min(ratios("stock")), max(ratios("stock"))],
        "over_stock_float32": statistics.median(ratios("stock float32" if "stock float32" in samples else "stock")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, default=list(LENGTHS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to write the records; others that the file has stay")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    machine = describe(args.threads)
    records = []
    print(
        f"\n{'task':10s}{'dtype':>10s}{'lengths':>9s}{'unpad':>7s}{'stock ms':>11s}{'ours ms':>10s}{'ratio':>8s}  range"
        f"{'over float32':>22s}"
    )
    for task in args.tasks:
        for dtype in args.dtypes:
            for lengths in args.lengths:
                for r in measure(task, dtype, lengths, args.rounds):
                    records.append(r)
                    limits = f"{r['range'][0]:.2f} to {r['range'][1]:.2f}"
                    print(
                        f"{task:10s}{dtype:>10s}{lengths:>9s}{r['unpad']!s:>7s}{r['stock_seconds'] * 1e3:>11.1f}"
                        f"{r['fast_seconds'] * 1e3:>10.1f}{r['over_stock']:>8.2f}  {limits:20s}"
                        f"{r['over_stock_float32']:>7.2f}",
                        flush=True,
                    )
    if args.json:
        merge_json(args.json, machine, "fast_bert", records, KEYS)


if __name__ == "__main__":
    main()
