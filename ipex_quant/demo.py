"""`ipex-quant demo`: quantize the embedded model in several ways, measure the results against float, and check them.

The two float models run stock transformers code, the quantized ones that of `llm.optimize`. A vision model and a text
encoder follow: see `demo_encoders`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from . import data, demo_encoders, evaluation, llm
from .demo_encoders import Check
from .llm.cache.naming import CACHE
from .nn import QuantizedModule
from .nn.linears import is_linear
from .recipes.apply import apply_recipe, calibration_data
from .recipes.recipe import load_recipe

SEQUENCE_LENGTH = 256
HELD_OUT_TOKENS = 16384
SPEED_TOKENS = 64
PROMPT = "The following statement"
GENERATED_TOKENS = 80
TABLE_HEAD = f"{'model':<12}{'recipe':<18}{'MB':>7}{'perplexity':>12}{'KL':>9}{'top-1':>8}{'decode token/s':>16}"


@dataclass(frozen=True)
class Limits:
    """Limits for a quantized model: upper ones for its size, relative to bfloat16, its perplexity, relative to float32,
    and its KL divergence in nats per token; a lower one for its top-1 agreement.
    """

    size: float
    perplexity: float
    kl_divergence: float
    top1_agreement: float


@dataclass(frozen=True)
class Variant:
    """A quantized model: its recipe, KV cache dtype and limits."""

    recipe: str
    limits: Limits
    kv_cache_dtype: torch.dtype | None = None


VARIANTS = {
    "INT8": Variant("w8a16", Limits(0.72, 1.003, 0.001, 0.97)),
    "W8A8": Variant("w8a8-smoothquant", Limits(0.72, 1.02, 0.006, 0.95)),
    "FP8": Variant("fp8-g128", Limits(0.73, 1.005, 0.004, 0.94)),
    "INT4 RTN": Variant("w4a8-g128", Limits(0.57, 1.015, 0.012, 0.9)),
    "INT8 cache": Variant("w4a8-g128", Limits(0.57, 1.015, 0.012, 0.9), torch.int8),
    "INT4 GPTQ": Variant("w4a8-gptq-g128", Limits(0.57, 1.01, 0.005, 0.94)),
    "NF4": Variant("nf4-g64", Limits(0.57, 1.02, 0.015, 0.9)),
}
"""The quantized models, by their label in the table."""

CACHE_SIZE = 0.6
"""Upper limit of the bytes of an INT8 KV cache, relative to a bfloat16 one."""


@dataclass(frozen=True)
class Row:
    """The measurements of one model.

    `tokens_per_second` is its decode speed, `cache_bytes` the size of the KV cache of `SEQUENCE_LENGTH` tokens.
    """

    label: str
    recipe: str
    bytes: int
    comparison: evaluation.Comparison
    tokens_per_second: float
    linears: int
    float_linears: int
    reloads_bit_equal: bool
    cache_bytes: int


def run() -> int:
    """Print the table, a generated text and the outcome of the checks; return the exit status, 1 if a check fails."""
    tokenizer = AutoTokenizer.from_pretrained(data.embedded_model_dir(), local_files_only=True)
    reference = float_model(torch.float32)
    rows: dict[str, Row] = {}
    text = ""

    def add(label: str, recipe: str, model: nn.Module) -> None:
        rows[label] = measure(label, recipe, model, reference, tokenizer)
        print(table_line(rows[label]), flush=True)

    print(f"{TABLE_HEAD}\n{'-' * len(TABLE_HEAD)}", flush=True)
    add("float32", "", reference)
    add("bfloat16", "", float_model(torch.bfloat16))
    for label, variant in VARIANTS.items():
        model = quantized_model(variant, tokenizer)
        add(label, variant.recipe, model)
        if label == "INT4 RTN":
            text = continuation(model, tokenizer, PROMPT, GENERATED_TOKENS)
    tokens = rows["float32"].comparison.tokens
    print(f"perplexity, KL(float32 || model) in nats and top-1 agreement over {tokens} held-out tokens")
    print(f"decoding: INT4 RTN runs at {speedup(rows):.1f} times the speed of stock transformers in bfloat16")
    print(f"\nINT4 RTN continues {PROMPT!r}:\n{text}\n")
    outcomes = checks(rows, text)
    for row in demo_encoders.measure_all(tokenizer):
        print(demo_encoders.line(row), flush=True)
        outcomes += demo_encoders.checks(row)
    failed = [check.name for check in outcomes if not check.passed]
    print("\n".join(f"FAILED  {name}" for name in failed) or f"all {len(outcomes)} checks passed")
    return 1 if failed else 0


def float_model(dtype: torch.dtype) -> nn.Module:
    """The embedded float model in `dtype`."""
    return AutoModelForCausalLM.from_pretrained(data.embedded_model_dir(), dtype=dtype, local_files_only=True).eval()


def quantized_model(variant: Variant, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    """The embedded model, quantized; the calibration text is not part of the held-out text."""
    recipe = load_recipe(variant.recipe)
    model = apply_recipe(recipe, float_model(torch.bfloat16), calibration_data(recipe, tokenizer))
    return llm.optimize(model, dtype=torch.bfloat16, inplace=True, kv_cache_dtype=variant.kv_cache_dtype)


def measure(label: str, recipe: str, model: nn.Module, reference: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Row:
    """Compare `model` with the float `reference` on the held-out text, and time it."""
    modules = list(model.modules())
    return Row(
        label=label,
        recipe=recipe,
        bytes=evaluation.model_bytes(model),
        comparison=evaluation.compare(
            reference, model, tokenizer, data.held_out_text(), SEQUENCE_LENGTH, HELD_OUT_TOKENS
        ),
        tokens_per_second=evaluation.decode_speed(model, tokenizer, PROMPT, SPEED_TOKENS),
        linears=sum(isinstance(module, QuantizedModule) for module in modules),
        float_linears=sum(is_linear(module) for module in modules),
        reloads_bit_equal=not recipe or reloads_bit_equal(model, tokenizer),
        cache_bytes=cache_bytes(model, tokenizer),
    )


def window(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """The first tokens of the held-out text."""
    return evaluation.token_windows(tokenizer, data.held_out_text(), SEQUENCE_LENGTH, SEQUENCE_LENGTH)[0]


def cache_bytes(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """Bytes of the KV cache of a window, with the spare slots that the cache has allocated."""
    with torch.inference_mode():
        layers = model(input_ids=window(tokenizer), use_cache=True)[CACHE].layers
    return sum(getattr(layer, "nbytes", None) or layer.keys.nbytes + layer.values.nbytes for layer in layers)


def reloads_bit_equal(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether `model`, saved and loaded again, has a bit-equal state dict and bit-equal logits."""
    tokens = window(tokenizer)
    with tempfile.TemporaryDirectory(prefix="ipex_quant_demo_") as folder, torch.inference_mode():
        llm.save(model, Path(folder) / "model")
        loaded = llm.load(Path(folder) / "model")
        state, loaded_state = model.state_dict(), loaded.state_dict()
        return (
            state.keys() == loaded_state.keys()
            and all(torch.equal(state[name], loaded_state[name]) for name in state)
            and torch.equal(model(input_ids=tokens).logits, loaded(input_ids=tokens).logits)
        )


def continuation(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int) -> str:
    """`prompt` and its continuation by greedy decoding of at most `new_tokens` tokens."""
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return tokenizer.decode(output[0], skip_special_tokens=True)


def table_line(row: Row) -> str:
    """The measurements of one model, under `TABLE_HEAD`."""
    return (
        f"{row.label:<12}{row.recipe or '(float)':<18}{row.bytes / 1e6:>7.2f}{row.comparison.perplexity:>12.3f}"
        f"{row.comparison.kl_divergence:>9.4f}{row.comparison.top1_agreement:>8.1%}{row.tokens_per_second:>16.0f}"
    )


def speedup(rows: dict[str, Row]) -> float:
    """Decode speed of the INT4 model relative to stock transformers in bfloat16."""
    return rows["INT4 RTN"].tokens_per_second / rows["bfloat16"].tokens_per_second


def checks(rows: dict[str, Row], text: str) -> list[Check]:
    """All checks of the measured rows and the generated text."""
    found = [check for label, variant in VARIANTS.items() for check in row_checks(rows, label, variant.limits)]
    gptq, rtn = (rows[label].comparison.kl_divergence for label in ("INT4 GPTQ", "INT4 RTN"))
    found.append(Check(f"INT4 GPTQ diverges less than INT4 RTN ({gptq:.4f} < {rtn:.4f})", gptq < rtn))
    size = rows["INT8 cache"].cache_bytes / rows["INT4 RTN"].cache_bytes
    found.append(Check(f"the INT8 cache is {size:.2f} of the bfloat16 one, below {CACHE_SIZE}", size < CACHE_SIZE))
    found.append(Check(f"at least 10 words are generated: {text!r}", len(text.split()) >= 10))
    return found


def row_checks(rows: dict[str, Row], label: str, limits: Limits) -> Iterator[Check]:
    """The checks of one quantized model."""
    row, result = rows[label], rows[label].comparison
    size = row.bytes / rows["bfloat16"].bytes
    perplexity = result.perplexity / rows["float32"].comparison.perplexity
    # Comparisons with NaN are false, so a model that returns NaN fails.
    for name, passed in (
        (f"something is quantized ({row.linears} modules)", row.linears > 0),
        (f"no linear module stays in float ({row.float_linears} do)", row.float_linears == 0),
        (f"size is {size:.2f} of bfloat16's, at most {limits.size}", size <= limits.size),
        (f"perplexity is {perplexity:.3f} of float32's, at most {limits.perplexity}", perplexity <= limits.perplexity),
        (
            f"KL divergence is {result.kl_divergence:.4f}, at most {limits.kl_divergence}",
            result.kl_divergence <= limits.kl_divergence,
        ),
        (
            f"top-1 agreement is {result.top1_agreement:.3f}, at least {limits.top1_agreement}",
            result.top1_agreement >= limits.top1_agreement,
        ),
        ("saved and loaded again it is bit-equal", row.reloads_bit_equal),
    ):
        yield Check(f"{label}: {name}", passed)
