"""`model.generate` with this package and with stock transformers: speed, memory, and the time outside of GEMMs.

`engine_rounds.py` documents the measurement. The time outside of GEMMs is that of a step minus that of its linears
alone, called in the same order with the same packed weights, in the same round.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from engine_rounds import EngineSpec, Task, measure, print_table
from engines import SHAPES
from machine import Limits, describe
from rounds import write_json

SCRIPT = "engine_torch.py"
EMBEDDED = "embedded"
OURS_INT4 = EngineSpec("ours, INT4", SCRIPT, {"stack": "ours", "weights": "int4"})
STOCK_INT4 = EngineSpec("transformers, INT4", SCRIPT, {"stack": "stock", "weights": "int4"})
OURS_W8A8 = EngineSpec("ours, W8A8", SCRIPT, {"stack": "ours", "weights": "w8a8"})
STOCK_BF16 = EngineSpec("transformers, bfloat16", SCRIPT, {"stack": "stock", "weights": "bf16"})
ENGINES = [
    OURS_INT4,
    EngineSpec("ours, INT4, INT8 cache", SCRIPT, {"stack": "ours", "weights": "int4", "kv_cache": "int8"}),
    EngineSpec("ours, INT4, compiled", SCRIPT, {"stack": "ours", "weights": "int4", "compiled": True}),
    EngineSpec("ours, INT3", SCRIPT, {"stack": "ours", "weights": "int3"}),
    EngineSpec("ours, INT2", SCRIPT, {"stack": "ours", "weights": "int2"}),
    OURS_W8A8,
    STOCK_INT4,
    STOCK_BF16,
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--shapes", nargs="+", choices=[*SHAPES, EMBEDDED], default=["llama-1.1b", "llama-8b-4-layers", EMBEDDED]
    )
    parser.add_argument("--engines", nargs="+", choices=[e.name for e in ENGINES], help="all, if not given")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--beams", type=int, default=4, help="1 leaves beam search out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to write the records")
    args = parser.parse_args()

    limits = Limits(args.threads)
    machine = describe(args.threads, dtype="bfloat16", **limits.best())
    engines = [e for e in ENGINES if args.engines is None or e.name in args.engines]
    records = []
    for shape in args.shapes:
        # the embedded model has 256 positions
        prompt = min(args.prompt, 256 - args.new_tokens) if shape == EMBEDDED else args.prompt
        records += measure(
            engines, shape, [Task(prompt, args.new_tokens, gemm=True)], args.rounds, args.threads, limits
        )
        if args.beams > 1:
            beams = Task(prompt, args.new_tokens // 2, args.beams)
            searching = [e for e in engines if e in (OURS_INT4, STOCK_INT4)]
            records += measure(searching, shape, [beams], max(1, args.rounds // 2), args.threads, limits)
    print_table(records)
    if args.json:
        write_json(args.json, {"machine": machine, "generate": records})


if __name__ == "__main__":
    main()
