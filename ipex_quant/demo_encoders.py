"""The second part of the demo: a small vision model and a small text encoder with random weights, in W8A8.

The output of every quantized layer is compared with the sums of its codes in float64, that of each model with float.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    PreTrainedTokenizerBase,
)

from . import data, evaluation, llm
from .nn import Int8Conv, QuantizedModule
from .nn.linears import is_convolution, is_linear
from .quantization import (
    calibrate,
    convert,
    default_static_qconfig_mapping,
    get_smooth_quant_qconfig_mapping,
    prepare,
)

Batch = dict[str, torch.Tensor]

BATCHES = 8
BATCH_SIZE = 4
IMAGE_SIZE = 64
TEXT_LENGTH = 64
LAYER_ERROR = 1e-3
"""Largest relative error from activations that round differently; saturated sums or float inputs exceed it."""
FOREIGN_OPS = tuple(
    f"aten::{name}" for name in ("convolution", "mm", "addmm", "linear", "fake_quantize", "quantize", "dequantize")
)
"""Prefixes of the names of torch's ops that multiply by a weight, or that quantize."""


@dataclass(frozen=True)
class Row:
    """The measurements of one quantized model.

    `error` is the error of its outputs relative to the float model's, `layer_errors` that of each quantized layer
    relative to the sums of its codes. `foreign_ops` names the ops among `FOREIGN_OPS` that ran.
    """

    label: str
    bytes: int
    float_bytes: int
    error: float
    layer_errors: dict[str, float]
    float_layers: tuple[str, ...]
    foreign_ops: tuple[str, ...]
    reloads_bit_equal: bool


@dataclass(frozen=True)
class Limits:
    """Limits for a model: upper ones for size and error, relative to float32, and its number of quantized layers."""

    size: float
    error: float
    layers: int


@dataclass(frozen=True)
class Check:
    """A statement, and whether it holds."""

    name: str
    passed: bool


LIMITS = {
    "W8A8 ConvNeXt": Limits(size=0.4, error=0.05, layers=20),
    "W8A8 BERT": Limits(size=0.8, error=0.05, layers=14),
}
"""Limits by the label of the model."""


def measure_all(tokenizer: PreTrainedTokenizerBase) -> Iterator[Row]:
    """Quantize and measure both models, with a fixed seed that does not change torch's global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield vision_row()
        yield text_row(tokenizer)


def vision_row() -> Row:
    """A ConvNeXt in static INT8: plain and grouped convolutions, and linear layers; traced, frozen, saved, loaded."""
    config = ConvNextConfig(
        hidden_sizes=[16, 32, 64, 96],
        depths=[1, 1, 2, 1],
        num_labels=10,
        image_size=IMAGE_SIZE,
        layer_scale_init_value=1.0,  # else the blocks add next to nothing
    )
    model = ConvNextForImageClassification(config).eval()
    coarse = torch.randn(BATCHES + 1, BATCH_SIZE, 3, IMAGE_SIZE // 8, IMAGE_SIZE // 8)
    *batches, held_out = ({"pixel_values": each.repeat_interleave(8, 2).repeat_interleave(8, 3)} for each in coarse)
    prepared = prepare(model, default_static_qconfig_mapping, example_kwarg_inputs=batches[0])
    quantized = convert(calibrate(prepared, batches), inplace=True)

    def reload(folder: Path) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # transformers' checks of values, which tracing makes constants
            traced = torch.jit.trace(quantized, held_out["pixel_values"][:1], strict=False)
        torch.jit.save(torch.jit.freeze(traced), folder / "model.pt")
        return torch.jit.load(folder / "model.pt")

    return measure("W8A8 ConvNeXt", model, quantized, held_out, reload)


def text_row(tokenizer: PreTrainedTokenizerBase) -> Row:
    """A BERT with SmoothQuant, in IPEX's three steps through `llm.optimize`; saved and loaded by `llm`."""
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=2 * TEXT_LENGTH,
    )
    model = BertForSequenceClassification(config).eval()
    mapping = get_smooth_quant_qconfig_mapping()
    batches = text_batches(tokenizer, data.calibration_text(), BATCHES)
    (held_out,) = text_batches(tokenizer, data.held_out_text(), 1)
    with tempfile.TemporaryDirectory(prefix="ipex_quant_demo_") as folder:
        summary = Path(folder) / "qconfig.json"
        lowered = llm.optimize(model, dtype=torch.float32, quantization_config=mapping)
        prepared = calibrate(prepare(lowered, mapping, example_kwarg_inputs=batches[0], inplace=True), batches)
        prepared.save_qconf_summary(qconf_summary=summary)
        quantized = llm.optimize(
            model,
            dtype=torch.float32,
            quantization_config=mapping,
            qconfig_summary_file=summary,
            sample_inputs=batches[0],
        )

    def reload(folder: Path) -> nn.Module:
        llm.save(quantized, folder / "model")
        return llm.load(folder / "model")

    return measure("W8A8 BERT", model, quantized, held_out, reload)


def text_batches(tokenizer: PreTrainedTokenizerBase, text: str, count: int) -> list[Batch]:
    """`count` batches of the first tokens of `text`, ``[BATCH_SIZE, TEXT_LENGTH]`` each."""
    tokens = torch.tensor(tokenizer(text[: 32 * count * BATCH_SIZE * TEXT_LENGTH])["input_ids"])
    rows = tokens[: count * BATCH_SIZE * TEXT_LENGTH].view(count, BATCH_SIZE, TEXT_LENGTH)
    return [{"input_ids": row} for row in rows]


def measure(
    label: str, reference: nn.Module, model: nn.Module, batch: Batch, reload: Callable[[Path], nn.Module]
) -> Row:
    """Compare `model` with the float `reference`, and with the result of `reload`, which saves and loads it."""
    with tempfile.TemporaryDirectory(prefix="ipex_quant_demo_") as folder, torch.no_grad():
        loaded = reload(Path(folder))
        same = torch.equal(output_of(loaded(*batch.values())), output_of(model(*batch.values())))
    with torch.no_grad(), _OpNames() as names:
        model(**batch)
    modules = dict(model.named_modules())
    return Row(
        label=label,
        bytes=evaluation.model_bytes(model),
        float_bytes=evaluation.model_bytes(reference),
        error=evaluation.compare_outputs(reference, model, [(batch, batch)]).error,
        layer_errors=layer_errors(model, batch),
        float_layers=tuple(name for name, module in modules.items() if is_linear(module) or is_convolution(module)),
        foreign_ops=tuple(sorted(name for name in names.seen if name.startswith(FOREIGN_OPS))),
        reloads_bit_equal=same,
    )


class _OpNames(TorchDispatchMode):
    """Collects the names of the ops that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.name())
        return func(*args, **(kwargs or {}))


def output_of(output: object) -> torch.Tensor:
    """The logits of a model's output."""
    return evaluation.main_output(output)[0]


def layer_errors(model: nn.Module, batch: Batch) -> dict[str, float]:
    """Relative error of each quantized layer that is called, compared with the sums of its codes, by name."""
    errors: dict[str, float] = {}

    def compare(name: str, layer: QuantizedModule) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...], result: torch.Tensor) -> None:
            expected = sums_of_codes(layer, args[0])
            errors[name] = ((result - expected).norm() / expected.norm()).item()

        return hook

    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedModule)}
    handles = [layer.register_forward_hook(compare(name, layer)) for name, layer in layers.items()]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return errors


def sums_of_codes(layer: QuantizedModule, x: torch.Tensor) -> torch.Tensor:
    """The output of a static W8A8 layer for `x`, computed in float64, in which sums of 8-bit codes are exact."""
    activation = layer.activation
    factor = torch.ones(1) if activation.smoothing_factor is None else activation.smoothing_factor
    codes = (x.double() * factor / activation.scale).round() + activation.zero_point
    values = (codes.clamp(0, 255) - activation.zero_point) * activation.scale / factor
    weight, bias = layer.weight.double(), None if layer.bias is None else layer.bias.double()
    if isinstance(layer, Int8Conv):
        return F.conv2d(values, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    return F.linear(values, weight, bias)


def line(row: Row) -> str:
    """One line of text with the measurements."""
    return (
        f"{row.label}: {len(row.layer_errors)} layers, {row.bytes / 1e6:.2f} of {row.float_bytes / 1e6:.2f} MB, "
        f"relative error {row.error:.4f}"
    )


def checks(row: Row) -> Iterator[Check]:
    """The checks of one model."""
    limits, size, count = LIMITS[row.label], row.bytes / row.float_bytes, len(row.layer_errors)
    wrong = [name for name, error in row.layer_errors.items() if not error <= LAYER_ERROR]  # NaN is wrong too
    foreign, stayed = ", ".join(row.foreign_ops) or "none", ", ".join(row.float_layers) or "none"
    for name, passed in (
        (f"{count} layers compute in 8 bits, expected {limits.layers}", count == limits.layers),
        (f"no layer stays in float: {stayed}", not row.float_layers),
        (f"no op of torch quantizes or multiplies by a weight: {foreign}", not row.foreign_ops),
        (f"every layer returns the sums of its codes: {', '.join(wrong) or 'all do'}", not wrong),
        (f"size is {size:.2f} of float32's, at most {limits.size}", size <= limits.size),
        (f"relative error is {row.error:.4f}, at most {limits.error}", row.error <= limits.error),
        ("saved and loaded again it is bit-equal", row.reloads_bit_equal),
    ):
        yield Check(f"{row.label}: {name}", passed)
