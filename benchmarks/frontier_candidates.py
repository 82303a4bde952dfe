"""What frontier.py compares: settings of this package's recipes and of the peers, by names that its table shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

OURS = "ipex_quant"


@dataclass(frozen=True)
class Producer:
    """A tool that quantizes: its script, and the environment in `build/frontier` that it runs in, None for this one."""

    script: str
    environment: str | None


PRODUCERS = {
    OURS: Producer("produce_recipes.py", None),
    "llama.cpp": Producer("produce_llamacpp.py", "llamacpp"),
    "auto-round": Producer("produce_auto_round.py", "auto-round"),
    "llm-compressor": Producer("produce_llm_compressor.py", "llm-compressor"),
    "GPTQModel": Producer("produce_gptqmodel.py", "gptqmodel"),
    "NNCF": Producer("produce_nncf.py", "nncf"),
    "neural-compressor": Producer("produce_neural_compressor.py", "neural-compressor"),
}


@dataclass(frozen=True)
class Candidate:
    """A way to quantize a model. `quick` ones take seconds on a small model; `settings` are the script's."""

    producer: str
    name: str
    settings: dict[str, Any]
    quick: bool = True


def _integers(bits: int, group: int, sym: bool = False) -> dict[str, Any]:
    scheme = "symmetric" if sym else "asymmetric"
    return {"weight_dtype": f"int{bits}", "weight_qscheme": scheme, "group_size": group, "lowp_mode": "none"}


def _title(algorithm: str, bits: int, group: int, sym: bool) -> str:
    groups = "per channel" if group < 0 else f"g{group}"
    return f"{algorithm}, {bits} bits {groups}{' sym' if sym else ''}"


SIZES = (
    *((2, 32), (2, 64), (3, 32), (3, 64), (3, 128), (4, 32), (4, 64), (4, 128)),
    *((5, 32), (5, 64), (6, 64), (6, 128), (8, 64), (8, 128)),
)
"""Bits and groups of weights with zero points."""

TABLES_TOO = ((2, 32), (3, 32), (3, 128), (4, 32), (4, 128), (5, 64), (6, 64), (8, 128))
"""Bits and groups of the linear layers where embedding and head are in INT8."""

IN_INT8 = {"head_dtype": "int8", "embedding_dtype": "int8"}

PEER_SIZES = (
    *((2, 32, False), (3, 64, False), (4, 128, False), (4, 128, True), (4, 64, False), (4, 32, False)),
    *((8, 128, True), (8, 64, True)),
)
"""Bits, groups and symmetry for those peers that take them."""

IN_FLOAT = {"skip": ["lm_head"]}


def _ours() -> list[Candidate]:
    names = ("w8a16", "w4a16-g128", "nf4-g64", "fp8-g128", "w4a8-awq-g128", "w4a8-gptq-g128")
    found = [Candidate(OURS, name, {"recipe": name}, "gptq" not in name and "awq" not in name) for name in names]
    for bits, group in SIZES:
        for algorithm, title in (("rtn", "RTN"), ("gptq", "GPTQ"), ("auto_round", "AutoRound")):
            settings = {"algorithm": algorithm, **_integers(bits, group), **IN_FLOAT}
            found.append(Candidate(OURS, _title(title, bits, group, False), settings, algorithm != "auto_round"))
    for algorithm, title, sym in (("gptq", "GPTQ", True), ("auto_round", "AutoRound", True), ("awq", "AWQ", False)):
        settings = {"algorithm": algorithm, **_integers(4, 128, sym), **IN_FLOAT}
        found.append(Candidate(OURS, _title(title, 4, 128, sym), settings, algorithm == "gptq"))
    for group in (32, 64, 128):
        for algorithm, title in (("gptq", "GPTQ"), ("auto_round", "AutoRound")):
            table = {"weight_dtype": "iq4", "group_size": group, "lowp_mode": "none"}
            settings = {"algorithm": algorithm, **table, **IN_FLOAT}
            found.append(Candidate(OURS, f"{title}, IQ4 g{group}", settings, algorithm == "gptq"))
    settings = {"algorithm": "awq", "gptq": True, **_integers(4, 64), **IN_FLOAT}
    found.append(Candidate(OURS, _title("AWQ with GPTQ", 4, 64, False), settings, False))
    for algorithm, title, bits, group in (("rtn", "RTN", 8, -1), ("gptq", "GPTQ", 8, -1), ("gptq", "GPTQ", 4, 64)):
        settings = {"algorithm": algorithm, **_integers(bits, group, True), **IN_FLOAT}
        found.append(Candidate(OURS, _title(title, bits, group, True), settings))
    for bits, group in TABLES_TOO:
        settings = {"algorithm": "gptq", **_integers(bits, group), **IN_INT8}
        found.append(Candidate(OURS, f"{_title('GPTQ', bits, group, False)}, tables too", settings))
    return found


GGUF_TYPES = (
    *("IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K_S", "Q3_K_M", "IQ4_XS", "IQ4_NL", "Q4_0"),
    *("Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "Q8_0"),
)
NEED_IMPORTANCE = ("IQ2_XXS", "IQ2_XS", "IQ2_S")


def _llamacpp() -> list[Candidate]:
    found = []
    for kind in GGUF_TYPES:
        for imatrix in (True, False):
            if not imatrix and (kind in NEED_IMPORTANCE or kind == "Q8_0"):
                continue
            for in_float in (True, False):
                title = f"{kind}{', imatrix' if imatrix and kind != 'Q8_0' else ''}{'' if in_float else ', tables too'}"
                settings = {"type": kind, "imatrix": imatrix and kind != "Q8_0", "tables_in_float": in_float}
                found.append(Candidate("llama.cpp", title, settings))
    return found


def _auto_round() -> list[Candidate]:
    found = []
    for bits, group, sym in PEER_SIZES:
        settings = {"bits": bits, "group_size": group, "sym": sym, "iters": 200, "batch_size": 8}
        found.append(Candidate("auto-round", _title("200 steps", bits, group, sym), settings, False))
    for bits, group in ((2, 32), (3, 64), (4, 64), (4, 32)):
        settings = {"bits": bits, "group_size": group, "sym": False, "iters": 50, "batch_size": 4}
        found.append(Candidate("auto-round", _title("50 steps of 4", bits, group, False), settings, False))
    settings = {"bits": 4, "group_size": 128, "sym": True, "iters": 0}
    return [*found, Candidate("auto-round", _title("RTN", 4, 128, True), settings, False)]


def _llm_compressor() -> list[Candidate]:
    found = []
    for bits, group, sym in PEER_SIZES:
        settings = {"algorithm": "gptq", "bits": bits, "group_size": group, "sym": sym}
        found.append(Candidate("llm-compressor", _title("GPTQ", bits, group, sym), settings, False))
    settings = {"algorithm": "rtn", "bits": 8, "group_size": -1, "sym": True}
    return [*found, Candidate("llm-compressor", _title("RTN", 8, -1, True), settings)]


def _gptqmodel() -> list[Candidate]:
    found = []
    for bits, group, sym in PEER_SIZES:
        settings = {"bits": bits, "group_size": group, "sym": sym, "format": "gptq" if sym else "gptq_v2"}
        found.append(Candidate("GPTQModel", _title("GPTQ", bits, group, sym), settings, False))
    return found


def _nncf() -> list[Candidate]:
    found = []
    for group in (128, 64):
        for extra, title in (
            ({}, "RTN"),
            ({"scale_estimation": True}, "scale estimation"),
            ({"awq": True, "scale_estimation": True}, "AWQ and scale estimation"),
            ({"gptq": True}, "GPTQ"),
        ):
            settings = {"mode": "INT4_ASYM", "group_size": group, **extra}
            found.append(Candidate("NNCF", _title(title, 4, group, False), settings, False))
    settings = {"mode": "INT8_ASYM", "group_size": -1}
    return [*found, Candidate("NNCF", _title("RTN", 8, -1, False), settings, False)]


def _neural_compressor() -> list[Candidate]:
    found = []
    for group in (128, 64):
        for algorithm, sym in (("rtn", False), ("gptq", False), ("gptq", True), ("awq", False)):
            settings = {"algorithm": algorithm, "bits": 4, "group_size": group, "sym": sym}
            found.append(Candidate("neural-compressor", _title(algorithm.upper(), 4, group, sym), settings, False))
    return found


def candidates(producers: list[str]) -> list[Candidate]:
    """All candidates of `producers`."""
    makers = (_ours, _llamacpp, _auto_round, _llm_compressor, _gptqmodel, _nncf, _neural_compressor)
    found = [candidate for make in makers for candidate in make()]
    return [candidate for candidate in found if candidate.producer in producers]
