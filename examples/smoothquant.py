"""SmoothQuant from float to deployment, on the embedded model with the outliers that large language models have.

Calibrates, saves the qconf summary, and quantizes with `prepare` and `convert` and with `llm.optimize`. Then prints the
perplexity of each way to quantize activations on held-out text, and the prefill speed of each model.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from outliers import inject_outliers
from torch import nn
from torch.ao.quantization import QConfigMapping
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import ipex_quant as ipex
from ipex_quant import data, evaluation

SAMPLES = 64
SEQUENCE_LENGTH = 256
HELD_OUT_TOKENS = 16384
SPEED_SECONDS = 0.3
SPEED_ROUNDS = 5


def main() -> None:
    """Quantize in every way, and print a line for each."""
    tokenizer = AutoTokenizer.from_pretrained(data.embedded_model_dir(), local_files_only=True)
    plain, outliers = float_model(), float_model()
    inject_outliers(outliers, lambda: outliers(**outliers.dummy_inputs))
    smooth = ipex.quantization.get_smooth_quant_qconfig_mapping(alpha=0.5)
    with tempfile.TemporaryDirectory(prefix="ipex_quant_recipe_") as folder:
        text, summary = Path(folder) / "calibration.txt", Path(folder) / "qconfig.json"
        text.write_text(data.calibration_text(), encoding="utf-8")
        calibration = ipex.quantization.calibration_dataloader(text, tokenizer, SAMPLES, SEQUENCE_LENGTH)
        static = quantized(outliers, ipex.quantization.default_static_qconfig_mapping, calibration)
        smoothed = quantized(outliers, smooth, calibration, summary)
        deployed = ipex.llm.optimize(
            outliers, dtype=torch.bfloat16, quantization_config=smooth, qconfig_summary_file=summary
        )
    dynamic = ipex.llm.optimize(plain, quantization_config=ipex.quantization.default_dynamic_qconfig_mapping)
    report(
        {
            "plain, float32": plain,
            "plain, bfloat16": float_model(torch.bfloat16),
            "plain, dynamic": dynamic,
            "outliers, float32": outliers,
            "outliers, static": static,
            "outliers, SmoothQuant": smoothed,
            "the same in bfloat16": deployed,
        },
        tokenizer,
    )


def float_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """The embedded float model in `dtype`."""
    return AutoModelForCausalLM.from_pretrained(data.embedded_model_dir(), dtype=dtype, local_files_only=True).eval()


def quantized(
    model: nn.Module, qconfig: QConfigMapping, calibration: torch.utils.data.DataLoader, summary: Path | None = None
) -> nn.Module:
    """Prepare, calibrate and convert a copy of `model`; save the qconf summary to `summary`."""
    example = next(iter(calibration))
    prepared = ipex.quantization.prepare(model, qconfig, example_kwarg_inputs=example)
    ipex.quantization.calibrate(prepared, calibration)
    if summary is not None:
        prepared.save_qconf_summary(qconf_summary=summary)
    return ipex.quantization.convert(prepared)


def report(models: dict[str, nn.Module], tokenizer: PreTrainedTokenizerBase) -> None:
    """Print accuracy and speed of each model, compared with the first one."""
    reference = next(iter(models.values()))
    held_out = data.held_out_text()
    window = evaluation.token_windows(tokenizer, held_out, SEQUENCE_LENGTH - 1, SEQUENCE_LENGTH - 1)[0]
    speeds = calls_per_second({name: lambda model=model: model(input_ids=window) for name, model in models.items()})
    print(f"{'model':<22}{'perplexity':>11}{'change':>9}{'KL':>9}{'top-1':>8}{'read token/s':>14}")
    for name, model in models.items():
        result = evaluation.compare(reference, model, tokenizer, held_out, SEQUENCE_LENGTH, HELD_OUT_TOKENS)
        change = result.perplexity / result.reference_perplexity - 1
        print(
            f"{name:<22}{result.perplexity:>11.3f}{change:>+9.2%}{result.kl_divergence:>9.4f}"
            f"{result.top1_agreement:>8.1%}{speeds[name] * window.numel():>14.0f}",
            flush=True,
        )


@torch.inference_mode()
def calls_per_second(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Calls per second of each of `calls`, the best of several rounds; they alternate, so that conditions are equal."""
    best = dict.fromkeys(calls, 0.0)
    for _ in range(SPEED_ROUNDS):
        for name, call in calls.items():
            call()
            count, start = 0, time.perf_counter()
            while time.perf_counter() - start < SPEED_SECONDS:
                call()
                count += 1
            best[name] = max(best[name], count / (time.perf_counter() - start))
    return best


if __name__ == "__main__":
    main()
