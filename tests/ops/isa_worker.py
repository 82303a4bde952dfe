"""Run a fixed set of cases in a process of its own, since the ISA level is chosen once a process.

``python isa_worker.py native OUT`` computes them with the native ops, ``reference`` with the plain-torch definition.
Every result is saved under a name that says what was computed; both must produce the same names.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Iterator

import torch
from safetensors.torch import save_file
from weights import (
    GROUP_SIZES,
    KINDS,
    MODES,
    dress,
    shuffle_features,
    stored_schemes,
)  # of this directory, where a script finds it

from ipex_quant import ops
from ipex_quant.numerics.scheme import WeightScheme, WoqActQuantMode, WoqLowpMode, WoqWeightDtype
from ipex_quant.ops import PostOp, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NEWER_GROUP_SIZES = [-1, 4, 32, 128]
"""Of the dtypes that IPEX does not have, which share most code."""

ROWS = [0, 1, 2, 3, 5, 7, 8, 9, 13, 16, 31, 33, 130]
FEATURES = [(1, 1), (64, 128), (65, 96), (3, 257), (130, 64), (31, 31), (127, 300), (64, 4), (40, 513), (200, 8)]
LONG_MODES = [WoqActQuantMode.PER_TENSOR, WoqActQuantMode.PER_BATCH_SYM, WoqActQuantMode.PER_IC_BLOCK]
# "signs" and "ones" make every code and every sum of products as large as can be.
VALUES = ["normal", "normal", "signs", "ones"]
POST_OPS = {PostOp.ADD: 1, PostOp.ADD_ADD: 2, PostOp.MUL: 1}


class Case:
    """One call of `woq_linear`: scheme and modes are given, the rest is drawn by chance from the lists above."""

    def __init__(self, index: int, scheme: WeightScheme, lowp_mode: WoqLowpMode, act_quant_mode: WoqActQuantMode):
        chance = random.Random(index)
        self.index = index
        self.scheme = scheme
        self.modes = (lowp_mode, act_quant_mode)
        self.x_dtype = chance.choice(DTYPES)
        self.weight_dtype = chance.choice(DTYPES)
        self.rows = chance.choice(ROWS)
        self.features = chance.choice(FEATURES)
        self.values = chance.choice(VALUES)
        # Half of the cases have none, so that nothing stands between the sums and their comparison.
        self.post_op = chance.choice([PostOp.NONE, chance.choice(list(PostOp))])
        self.has_bias = chance.random() < 0.8
        self.act_order = chance.random() < 0.25
        self.scale_dtype = chance.choice([torch.float32, torch.float16])

    @property
    def name(self) -> str:
        features = "x".join(map(str, self.features))
        modes = "|".join(mode.name for mode in self.modes)
        x_dtype = str(self.x_dtype).removeprefix("torch.")
        return f"{self.scheme}|{modes}|{x_dtype}|{self.post_op.name}|m{self.rows}|{features}|{self.index}"


def draw_values(shape: tuple[int, ...], values: str, generator: torch.Generator) -> torch.Tensor:
    normal = torch.randn(shape, generator=generator)
    return {"normal": normal, "signs": normal.sign(), "ones": torch.ones(shape)}[values]


def long_cases(first: int) -> Iterator[Case]:
    """Sums of more products than fit 32 bits, which must be folded in between; small weights of large values."""
    kinds = [kind for kind in KINDS if kind[0].fits_int8]
    for index, ((dtype, symmetric), mode) in enumerate(itertools.product(kinds, LONG_MODES), first):
        case = Case(index, WeightScheme(dtype, symmetric, (-1, 2**16)[index % 2]), WoqLowpMode.INT8, mode)
        case.features = (3, 66001)
        case.values = VALUES[1 + index % 3]
        case.rows = (2, 9)[index // 2 % 2]
        yield case


def stored_cases(first: int) -> Iterator[Case]:
    """Minimums and super scales, in every row count of the float and of the integer kernels."""
    schemes = [scheme for size in (16, 32) for scheme in stored_schemes(size, 4 * size)]
    modes = [MODES[0], MODES[2], *MODES[3::3]]
    for index, (scheme, mode) in enumerate(itertools.product(schemes, modes), first):
        case = Case(index, scheme, *mode)
        case.features = ((70, 256), (130, 128))[index % 2]
        case.act_order = False
        case.values = "normal"
        yield case


def cases() -> Iterator[Case]:
    combinations = [
        (kind, group_size, mode)
        for kind in KINDS
        for group_size in (GROUP_SIZES if kind[0] <= WoqWeightDtype.FP8 else NEWER_GROUP_SIZES)
        for mode in MODES
    ]
    for index, ((dtype, symmetric), group_size, (lowp_mode, act_quant_mode)) in enumerate(combinations):
        yield Case(index, WeightScheme(dtype, symmetric, group_size), lowp_mode, act_quant_mode)
    yield from long_cases(10_000)
    yield from stored_cases(20_000)


def weight_of(case: Case, generator: torch.Generator) -> torch.Tensor:
    weight = draw_values(case.features, case.values, generator) / case.features[1] ** 0.5
    return weight.to(case.weight_dtype)


def run(case: Case, native: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(case.index)
    quantize = ops.quantize_weight if native else reference.quantize_weight
    scheme = case.scheme
    plain = WeightScheme(scheme.dtype, scheme.symmetric, scheme.group_size)
    qw = quantize(weight_of(case, generator), plain, case.scale_dtype)
    qw = dress(qw, scheme) if scheme.minimums or scheme.super_group_size is not None else qw
    results = {"codes": qw.codes, "scales": qw.scales}
    if qw.zero_points is not None:
        results["zero_points"] = qw.zero_points
    if case.act_order:
        qw = shuffle_features(qw, case.index)

    out_features, in_features = case.features
    x = draw_values((case.rows, in_features), case.values, generator).to(case.x_dtype)
    bias = torch.randn(out_features, generator=generator) if case.has_bias else None
    others = [
        torch.randn(case.rows, out_features, generator=generator).to(case.x_dtype)
        for _ in range(POST_OPS.get(case.post_op, 0))
    ]
    options = (*case.modes, case.post_op, others)
    if native:
        packed = ops.pack_weight(qw)
        results["packed"] = packed.data
        results["y"] = ops.woq_linear(x, packed.data, out_features, bias, packed.perm, *options)
    else:
        results["y"] = reference.woq_linear(x, qw, bias, *options)
    return {f"{case.name}/{key}": value for key, value in results.items()}


def main(kind: str, path: str) -> None:
    torch.set_num_threads(1)
    results: dict[str, torch.Tensor] = {}
    for case in cases():
        results |= run(case, kind == "native")
    save_file(results, path, {"isa": ops.isa_name()})


if __name__ == "__main__":
    main(*sys.argv[1:])
