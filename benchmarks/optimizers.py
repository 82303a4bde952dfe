"""Optimizer steps of `ipex_quant.optimize` against torch's ``foreach`` ones, in interleaved rounds of one run.

The parameters are 100 million of a transformer: an embedding, 12 blocks of width 768, with their biases and norms.
"fused" is float32 as stock; "split" has bfloat16 parameters and gradients, and the lower halves of the values. A ratio
is stock seconds over ours within a round, and the figures are medians over the rounds. LAMB and LARS, which torch has
not, are compared with their formulas in ``torch._foreach_*`` calls.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from machine import describe
from rounds import mean_seconds, write_json
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

import ipex_quant as ipex
from ipex_quant.optim import Lamb, Lars

WIDTH, BLOCKS, VOCABULARY = 768, 12, 19600


def transformer() -> nn.Module:
    """The parameters of a transformer, in training mode; it has no use as a model."""
    blocks = [
        layer
        for _ in range(BLOCKS)
        for layer in (
            *(nn.Linear(WIDTH, WIDTH) for _ in range(4)),
            nn.Linear(WIDTH, 4 * WIDTH),
            nn.Linear(4 * WIDTH, WIDTH),
            nn.LayerNorm(WIDTH),
            nn.LayerNorm(WIDTH),
        )
    ]
    return nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), *blocks).train()


Step = Callable[[], object]
Make = Callable[[list[nn.Parameter]], Optimizer]


def torch_foreach(kind: type[Optimizer], **settings: float) -> tuple[Make, Make]:
    """Stock, and the optimizer to give to `ipex_quant.optimize`."""
    return (lambda params: kind(params, foreach=True, **settings)), (lambda params: kind(params, **settings))


class ForeachLamb(Lamb):
    """LAMB in calls that each make one pass over all parameters."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update all parameters."""
        (group,) = self.param_groups
        params, grads = group["params"], [p.grad for p in group["params"]]
        for p in params:
            if p not in self.state:
                self.state[p] = {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            self.state[p]["step"] += 1
        averages, squares = ([self.state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq"))
        (beta1, beta2), count = group["betas"], self.state[params[0]]["step"]
        torch._foreach_lerp_(averages, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        steps = torch._foreach_sqrt(squares)
        torch._foreach_div_(steps, math.sqrt(1 - beta2**count))
        torch._foreach_add_(steps, group["eps"])
        steps = torch._foreach_div(averages, steps)
        torch._foreach_div_(steps, 1 - beta1**count)
        torch._foreach_add_(steps, params, alpha=group["weight_decay"])
        scales = torch._foreach_div(torch._foreach_norm(params), torch._foreach_norm(steps))
        torch._foreach_mul_(steps, [float(scale) if math.isfinite(scale) and scale else 1.0 for scale in scales])
        torch._foreach_add_(params, steps, alpha=-group["lr"])


class ForeachLars(Lars):
    """LARS in calls that each make one pass over all parameters."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update all parameters."""
        (group,) = self.param_groups
        params, grads = group["params"], [p.grad for p in group["params"]]
        norms = zip(torch._foreach_norm(params), torch._foreach_norm(grads), strict=True)
        decay = group["weight_decay"]
        rates = [float(group["eeta"] * w / (g + decay * w)) if w and g else 1.0 for w, g in norms]
        grads = torch._foreach_add(grads, params, alpha=decay)
        if params[0] not in self.state:
            self.state.update((p, {"momentum_buffer": g}) for p, g in zip(params, grads, strict=True))
        else:
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, grads)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_add_(params, torch._foreach_mul(buffers, [-group["lr"] * rate for rate in rates]))


def layerwise(kind: type[Optimizer], stock: type[Optimizer], **settings: float) -> tuple[Make, Make]:
    """The same for an optimizer that torch has not."""
    return (lambda params: stock(params, **settings)), (lambda params: kind(params, **settings))


CASES = {
    "SGD": torch_foreach(SGD, lr=1e-4, momentum=0.9),
    "Adam": torch_foreach(Adam, lr=1e-4),
    "AdamW": torch_foreach(AdamW, lr=1e-4),
    "Adagrad": torch_foreach(Adagrad, lr=1e-4),
    "Lamb": layerwise(Lamb, ForeachLamb, lr=1e-4, weight_decay=0.01),
    "Lars": layerwise(Lars, ForeachLars, lr=1e-4, momentum=0.9, weight_decay=0.01),
}
"""Optimizers by name, for stock and for us."""


def steps(name: str) -> dict[str, Step]:
    """A step of each implementation, on parameters of its own that have gradients."""
    stock, ours = CASES[name]
    model = transformer()
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 1e-3
    optimizers = {"stock": stock(list(model.parameters()))}
    for implementation, dtype in (("fused", torch.float32), ("split", torch.bfloat16)):
        copied = copy.deepcopy(model)
        optimizer = ours(list(copied.parameters()))
        _, optimizers[implementation] = ipex.optimize(copied, dtype, optimizer, inplace=True)
        for p, other in zip(copied.parameters(), model.parameters(), strict=True):
            p.grad = other.grad.to(p.dtype)
    return {implementation: optimizer.step for implementation, optimizer in optimizers.items()}


def measure(name: str, rounds: int) -> dict:
    """One record; a round is one step of each implementation."""
    calls = steps(name)
    for call in calls.values():  # which makes the state
        call()
    samples: dict[str, list[float]] = {implementation: [] for implementation in calls}
    for number in range(rounds):
        for implementation in list(calls)[:: 1 if number % 2 else -1]:
            samples[implementation].append(mean_seconds(calls[implementation], 1))
    record: dict = {"optimizer": name}
    for implementation, seconds in samples.items():
        record[f"{implementation}_seconds"] = statistics.median(seconds)
        if implementation != "stock":
            ratios = [a / b for a, b in zip(samples["stock"], seconds, strict=True)]
            record[f"{implementation}_over_stock"] = statistics.median(ratios)
            record[f"{implementation}_range"] = [min(ratios), max(ratios)]
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--optimizers", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="where to write the records; others that the file has stay")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    millions = round(sum(p.numel() for p in transformer().parameters()) / 1e6)
    machine = describe(args.threads, parameters_in_millions=millions)
    records = []
    print(f"\n{'optimizer':11s}{'stock ms':>10s}{'fused ms':>10s}{'ratio':>7s}{'split ms':>10s}{'ratio':>7s}")
    for name in args.optimizers:
        r = measure(name, args.rounds)
        records.append(r)
        print(
            f"{name:11s}{r['stock_seconds'] * 1e3:>10.1f}{r['fused_seconds'] * 1e3:>10.1f}{r['fused_over_stock']:>7.2f}"
            f"{r['split_seconds'] * 1e3:>10.1f}{r['split_over_stock']:>7.2f}",
            flush=True,
        )
    if args.json:
        old = json.loads(args.json.read_text())["steps"] if args.json.exists() else []
        merged = {r["optimizer"]: r for r in (*old, *records)}
        write_json(args.json, {"machine": machine, "steps": list(merged.values())})


if __name__ == "__main__":
    main()
