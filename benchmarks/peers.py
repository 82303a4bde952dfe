"""Generation with this package, llama.cpp, ik_llama.cpp, OpenVINO and transformers, in one run.

`make bench-peers` installs the others.
`engine_rounds.py` documents the measurement. All engines run a Llama of the same shape with random weights, every
matrix of it in the engine's 4-bit or 8-bit type, on the same number of threads. The table gives the reason for an
engine that cannot be installed, or fails. Models are written once, to `build/peers/models`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from engine_rounds import EngineSpec, Task, measure, print_table
from engines import SHAPES
from generate import OURS_INT4, OURS_W8A8, STOCK_BF16
from machine import Limits, describe
from rounds import write_json

LLAMACPP = {"script": "engine_llamacpp.py", "environment": "llamacpp"}
IK_LLAMACPP = {"script": "engine_ikllamacpp.py", "environment": "ikllamacpp"}
OPENVINO = {"script": "engine_openvino.py", "environment": "openvino"}
ENGINES = [
    OURS_INT4,
    EngineSpec("llama.cpp, Q4_0", options={"weights_type": "Q4_0"}, file="{shape}-Q4_0.gguf", **LLAMACPP),
    EngineSpec("ik_llama.cpp, Q4_0", options={"weights_type": "Q4_0"}, file="{shape}-Q4_0.gguf", **IK_LLAMACPP),
    EngineSpec("OpenVINO, int4", options={"weights_type": "int4"}, file="{shape}-int4-openvino", **OPENVINO),
    OURS_W8A8,
    EngineSpec("llama.cpp, Q8_0", options={"weights_type": "Q8_0"}, file="{shape}-Q8_0.gguf", **LLAMACPP),
    EngineSpec("ik_llama.cpp, Q8_0", options={"weights_type": "Q8_0"}, file="{shape}-Q8_0.gguf", **IK_LLAMACPP),
    EngineSpec("OpenVINO, int8", options={"weights_type": "int8"}, file="{shape}-int8-openvino", **OPENVINO),
    STOCK_BF16,
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["llama-1.1b", "llama-8b-4-layers"])
    parser.add_argument("--engines", nargs="+", choices=[e.name for e in ENGINES], help="all, if not given")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="the first shape only, and two rounds")
    parser.add_argument("--json", type=Path, help="where to write the records")
    args = parser.parse_args()
    if args.quick:
        args.shapes, args.rounds = args.shapes[:1], 2

    limits = Limits(args.threads)
    machine = describe(args.threads, dtype="bfloat16", **limits.best())
    engines = [e for e in ENGINES if args.engines is None or e.name in args.engines]
    task = Task(args.prompt, args.new_tokens)
    records = [r for shape in args.shapes for r in measure(engines, shape, [task], args.rounds, args.threads, limits)]
    print_table(records)
    if args.json:
        write_json(args.json, {"machine": machine, "generate": records})


if __name__ == "__main__":
    main()
