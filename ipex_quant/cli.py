"""`ipex-quant`: quantize, autotune, generate, eval, explain and demo from a shell.

Commands import what they need when they run, so that `--help` and wrong usage answer at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import ipex_quant as ipex

from .recipes import recipe_names
from .writing import new_directory

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

FAILED = 1
BAD_INPUT = 2
DTYPES = ("bfloat16", "float16", "float32")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, 1 for a failure, or 2 for wrong usage or bad input."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if options.traceback:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"ipex-quant {options.command}: error: {message}", file=sys.stderr)
        return BAD_INPUT if isinstance(error, (OSError, TypeError, ValueError)) else FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ipex-quant", description="Quantization of LLMs for CPUs.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {ipex.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        sub.add_argument("--traceback", action="store_true", help="show where an error comes from")
        sub.set_defaults(run=run)
        return sub

    sub = command("quantize", _quantize, "Quantize a model directory and save the result.")
    sub.add_argument("model_dir", type=Path, metavar="MODEL_DIR", help="float model with its tokenizer")
    sub.add_argument(
        "--recipe", required=True, help=f"{', '.join(recipe_names())}, or a YAML file (see CONTRIBUTING.md)"
    )
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="new directory for the result")
    sub.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of activations (default %(default)s)")
    sub.add_argument(
        "--dataset",
        metavar="FILE_OR_NAME",
        help="calibration text: a .txt, .json, .jsonl or .parquet file, or a name on the hub (default: Python's docs)",
    )
    sub.add_argument("--column", metavar="NAME", help="column of the dataset that holds the text")
    sub.add_argument("--samples", type=_positive, metavar="N", help="windows of the text (default: the recipe's)")

    sub = command("autotune", _autotune, "Find the best way to quantize a model within an accuracy budget.")
    sub.add_argument("model_dir", metavar="MODEL_DIR", help='float model with its tokenizer, or "embedded"')
    sub.add_argument("--recipe", default="w8a8-smoothquant", help="recipe to tune around (default %(default)s)")
    sub.add_argument("--max-loss", type=float, default=0.01, metavar="X", help="allowed rise of perplexity, relative")
    sub.add_argument("--max-bytes-per-weight", type=float, metavar="X", help="budget of a weight-only recipe")
    sub.add_argument("--time", type=float, default=0, metavar="S", help="seconds; 0 ends at the first success")
    sub.add_argument("--text", type=Path, metavar="FILE", help="text whose perplexity counts")
    sub.add_argument("--max-tokens", type=_positive, default=8192, metavar="N", help="predict at most N of its tokens")
    sub.add_argument("--sequence-length", type=_positive, default=512, metavar="N")
    sub.add_argument("--dataset", metavar="FILE_OR_NAME", help="calibration text (default: Python's docs)")
    sub.add_argument("--column", metavar="NAME", help="column of the dataset that holds the text")
    sub.add_argument("--samples", type=_positive, default=100, metavar="N", help="windows of it (default %(default)s)")
    sub.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of activations (default %(default)s)")
    sub.add_argument("--record", type=Path, metavar="FILE", help="keep the trials there, to go on after a stop")
    sub.add_argument(
        "--report", type=Path, action="append", metavar="FILE", help="write a report: .html, .json or .svg"
    )
    sub.add_argument("--out", type=Path, metavar="DIR", help="new directory for the tuned model")

    sub = command("generate", _generate, "Continue a prompt with a quantized model.")
    sub.add_argument("directory", type=Path, metavar="DIR", help="result of `ipex-quant quantize`")
    sub.add_argument("--prompt", required=True)
    sub.add_argument("--max-new-tokens", type=_positive, default=64, metavar="N")

    sub = command("eval", _eval, "Compare a quantized model with its float model on a text.")
    sub.add_argument("directory", type=Path, metavar="DIR", help="result of `ipex-quant quantize`")
    sub.add_argument("--reference", type=Path, required=True, metavar="FLOAT_DIR", help="the float model")
    sub.add_argument("--text", type=Path, required=True, metavar="FILE")
    sub.add_argument("--sequence-length", type=_positive, default=512, metavar="N")
    sub.add_argument("--max-tokens", type=_positive, metavar="N", help="predict at most N tokens of the text")

    sub = command("explain", _explain, "Show how each module of a quantized model is computed.")
    sub.add_argument("directory", type=Path, metavar="DIR", help="result of `ipex-quant quantize`")

    command("demo", _demo, "Quantize the embedded model in several ways and check the results.")
    return parser


def _quantize(options: argparse.Namespace) -> int:
    from dataclasses import replace

    from . import evaluation
    from .recipes.apply import apply_recipe, calibration_data
    from .recipes.recipe import Calibrated, load_recipe

    recipe = load_recipe(options.recipe)
    if not isinstance(recipe.settings, Calibrated) and (options.dataset or options.column or options.samples):
        raise ValueError(f"--dataset, --column, --samples: recipe {recipe.name} does not calibrate; leave them out")
    if options.samples:
        recipe = replace(recipe, settings=replace(recipe.settings, samples=options.samples))
    tokenizer = _tokenizer(options.model_dir)
    with new_directory(options.out, "--out") as out:
        try:
            calibration = calibration_data(recipe, tokenizer, options.dataset, options.column)
        except RuntimeError as error:  # the hub has no such dataset, or cannot be reached
            raise ValueError(f"--dataset: {error}") from error
        model = _float_model(options.model_dir, options.dtype)
        before = evaluation.model_bytes(model)
        model = apply_recipe(recipe, model, calibration, model.dtype)
        ipex.llm.save(model, out, tokenizer)
    after = evaluation.model_bytes(model)
    print(f"{options.out}: {recipe.name}, {after / 1e6:.1f} MB in memory, before {before / 1e6:.1f} MB")
    return 0


def _autotune(options: argparse.Namespace) -> int:
    from . import data
    from .recipes.recipe import load_recipe
    from .recipes.tune import Tuning

    recipe = load_recipe(options.recipe)
    if options.out is not None and options.out.exists():
        raise ValueError(f"--out: expected a directory that does not exist yet, got {options.out}")
    embedded = options.model_dir == "embedded"
    if options.text is None and not embedded:
        raise ValueError("--text: expected a file whose perplexity counts")
    text = options.text.read_text(encoding="utf-8") if options.text else data.held_out_text()
    directory = data.embedded_model_dir() if embedded else Path(options.model_dir)
    tokenizer = _tokenizer(directory)
    tuning = Tuning(recipe, tokenizer, options.samples, options.sequence_length)
    try:
        calibration = tuning.calibration(options.dataset, options.column)
    except RuntimeError as error:  # the hub has no such dataset, or cannot be reached
        raise ValueError(f"--dataset: {error}") from error
    model, report = tuning.run(
        _float_model(directory, options.dtype),
        calibration,
        tuning.perplexity(text, options.max_tokens),
        accuracy_criterion={"relative": options.max_loss},
        max_bytes_per_weight=options.max_bytes_per_weight,
        tuning_time=options.time,
        record=options.record,
        report=options.report or (),
    )
    print(report.table())
    if options.out is not None:
        ipex.llm.save(model, options.out, tokenizer)
        print(f"{options.out}: the result")
    return 0


def _generate(options: argparse.Namespace) -> int:
    from .demo import continuation

    model, tokenizer = _quantized_model(options.directory), _tokenizer(options.directory)
    print(continuation(model, tokenizer, options.prompt, options.max_new_tokens))
    return 0


def _eval(options: argparse.Namespace) -> int:
    from . import evaluation

    text = options.text.read_text(encoding="utf-8")
    model, tokenizer = _quantized_model(options.directory), _tokenizer(options.directory)
    reference = _float_model(options.reference, "float32")
    result = evaluation.compare(reference, model, tokenizer, text, options.sequence_length, options.max_tokens)
    float_size, size = (f"{evaluation.model_bytes(each) / 1e6:.1f} MB" for each in (reference, model))
    print(f"tokens                {result.tokens}")
    print(f"reference perplexity  {result.reference_perplexity:.4f}  ({float_size})")
    print(f"perplexity            {result.perplexity:.4f}  ({size})")
    print(f"KL(reference||model)  {result.kl_divergence:.6f} nats per token")
    print(f"top-1 agreement       {result.top1_agreement:.2%}")
    return 0


def _explain(options: argparse.Namespace) -> int:
    ipex.explain(_quantized_model(options.directory))
    return 0


def _demo(options: argparse.Namespace) -> int:
    from transformers.utils.logging import disable_progress_bar

    from . import demo

    disable_progress_bar()  # a line for each of a dozen loads and saves would bury the table
    return demo.run()


def _quantized_model(directory: Path) -> nn.Module:
    with _naming(directory):
        return ipex.llm.load(_model_directory(directory))


def _float_model(directory: Path, dtype: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    with _naming(directory):
        return AutoModelForCausalLM.from_pretrained(
            _model_directory(directory), dtype=dtype, local_files_only=True
        ).eval()


@contextmanager
def _naming(directory: Path) -> Iterator[None]:
    """Damaged safetensors are bad input; their errors do not say where."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{directory}: {error}") from error


def _tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(_model_directory(directory), local_files_only=True)


def _model_directory(path: Path) -> Path:
    if not (path / "config.json").is_file():
        raise ValueError(f"{path}: expected a model directory with a config.json")
    return path


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)
