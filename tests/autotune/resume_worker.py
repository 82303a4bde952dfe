"""Tunes a small model and, when told, kills itself in the middle of a trial; see `test_resume`.

Arguments: the record, where to write the result, and the number of the evaluation to die in (0 for none).
"""

import itertools
import os
import signal
import sys

import torch
from torch import nn

from ipex_quant.autotune import autotune


def main(record, summary, deadly):
    torch.manual_seed(0)
    sizes = [32] * 9
    model = nn.Sequential(*(nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in itertools.pairwise(sizes))).eval()
    batches = [torch.randn(8, 32) for _ in range(4)]
    expected = [model(x) for x in batches]
    calls = 0

    def evaluate(candidate):
        nonlocal calls
        calls += 1
        if calls == deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return -sum((candidate(x) - y).square().mean().item() for x, y in zip(batches, expected, strict=True))

    prepared = autotune(
        model,
        batches,
        eval_func=evaluate,
        sampling_sizes=[16, 32],
        accuracy_criterion={"absolute": 6.5e-7},
        tuning_time=10_000,
        record=record,
    )
    prepared.save_qconf_summary(qconf_summary=summary)
    print(calls)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
