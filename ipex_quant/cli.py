"""`ipex-quant`: quantize, autotune, export, convert, generate, eval, explain, serve, chat and demo from a shell.

Commands import their modules when they run, so that `--help` and usage errors are fast.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ipex_quant as ipex

from . import cli_serving
from .recipes import recipe_names
from .recipes.best import BEST_RECIPES
from .writing import new_directory, write_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .autotune import Report
    from .recipes.recipe import Recipe

FAILED = 1
BAD_INPUT = 2
DTYPES = ("bfloat16", "float16", "float32")
MESSAGE_LENGTH = 1000
MAX_LOSS = 0.01
MODEL_HELP = (
    "result of `ipex-quant quantize`, a checkpoint that another tool quantized, a GGUF file, or a float model; or its "
    "id in the hub"
)
EXPORT_FORMATS = ("gptq", "awq", "compressed-tensors", "gguf")
TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
    *("vocab.*", "merges.txt", "*.model", "*.tiktoken"),
)
"""Patterns of the files of tokenizers."""

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""Files of processors that make model inputs from images and sounds."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status: 0, 1 for a failure, or 2 for wrong usage or bad input."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    options.rest = rest
    if rest and not hasattr(options, "passes_on"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        _find_models(options)
        return options.run(options)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if options.traceback:
            raise
        message = textwrap.shorten(str(error), MESSAGE_LENGTH, placeholder=" ...") or type(error).__name__
        print(f"ipex-quant {options.command}: error: {message}", file=sys.stderr)
        return BAD_INPUT if isinstance(error, (OSError, TypeError, ValueError)) else FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ipex-quant", description="Quantization of LLMs for CPUs.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {ipex.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        sub.add_argument("--traceback", action="store_true", help="show where an error comes from")
        if name not in ("chat", "demo"):
            sub.add_argument(
                "--trust-remote-code", action="store_true", help="run code that lies in the model directory"
            )
            sub.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a model of the hub")
            sub.add_argument("--file", metavar="NAME", help="which GGUF file, if there are several")
        sub.set_defaults(run=run)
        return sub

    def inputs(sub: argparse._ActionsContainer, help: str) -> None:
        help = f"{help}: a safetensors file of arguments, [samples, ...] each"
        sub.add_argument("--inputs", type=Path, metavar="FILE", help=help)

    sub = command("quantize", _quantize, "Quantize a model directory and save the result.")
    sub.add_argument(
        "model_dir",
        type=Path,
        metavar="MODEL_DIR",
        help="float model with its tokenizer, a GGUF file in float, or its id in the hub",
    )
    chosen = sub.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--recipe", help=f"{', '.join(recipe_names())}, or a YAML file (see CONTRIBUTING.md)")
    chosen.add_argument("--bits", type=int, choices=sorted(BEST_RECIPES), help="the best known recipe of that size")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="new directory for the result")
    sub.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of activations (default %(default)s)")
    _add_dataset(sub)
    sub.add_argument("--column", metavar="NAME", help="column of the dataset that holds the text")
    sub.add_argument("--samples", type=_positive, metavar="N", help="windows of the text (default: the recipe's)")
    inputs(sub, "what to calibrate a model on that is not called with text")
    sub.add_argument(
        "--imatrix",
        type=Path,
        metavar="FILE",
        help="importance matrix of llama.cpp (.gguf or .dat), by which recipes that round to nearest look for scales",
    )
    sub.add_argument("--work-dir", type=Path, metavar="DIR", help="keep tuned blocks there, to go on after a stop")

    sub = command("autotune", _autotune, "Find the best way to quantize a model within an accuracy budget.")
    sub.add_argument("model_dir", metavar="MODEL_DIR", help='float model with its tokenizer, or "embedded"')
    sub.add_argument(
        "--recipe",
        help="recipe to tune around (default: w8a8-smoothquant; with a budget integer weights of 2 to 8 bits, by GPTQ)",
    )
    sub.add_argument("--size", metavar="BYTES", help="budget: the size of all that is stored, as 120MB or 1.5GiB")
    sub.add_argument("--max-kl", type=float, metavar="X", help="budget: KL divergence from float, in nats per token")
    sub.add_argument("--tokens-per-second", type=float, metavar="X", help="budget: speed of decoding, on this machine")
    sub.add_argument("--max-bytes-per-weight", type=float, metavar="X", help="budget: average over linear layers")
    sub.add_argument(
        "--max-loss",
        type=float,
        metavar="X",
        help="without --size, --max-kl and --tokens-per-second: allowed rise of perplexity, relative; of models that "
        f"have none, squared error of the outputs, relative (default {MAX_LOSS})",
    )
    sub.add_argument("--time", type=float, default=0, metavar="S", help="seconds; 0 ends at the first success")
    sub.add_argument(
        "--algorithms",
        nargs="+",
        metavar="NAME",
        help="gptq, awq, auto_round or rtn: what finds the weights, tried in this order; all but the first need --time "
        "(default: the recipe's own, or gptq, and rtn)",
    )
    sub.add_argument("--text", type=Path, metavar="FILE", help="text whose perplexity, or divergence, counts")
    sub.add_argument("--max-tokens", type=_positive, default=8192, metavar="N", help="predict at most N of its tokens")
    sub.add_argument("--sequence-length", type=_positive, default=512, metavar="N")
    _add_dataset(sub)
    sub.add_argument("--column", metavar="NAME", help="column of the dataset that holds the text")
    sub.add_argument("--samples", type=_positive, metavar="N", help="windows of it (default 100; with a budget 64)")
    inputs(sub, "what to calibrate a model on that is not called with text")
    sub.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of activations (default %(default)s)")
    sub.add_argument("--record", type=Path, metavar="FILE", help="keep the trials there, to go on after a stop")
    sub.add_argument(
        "--report", type=Path, action="append", metavar="FILE", help="write a report: .html, .json or .svg"
    )
    sub.add_argument(
        "--out", type=Path, metavar="DIR", help="new directory for the tuned model, its recipe.yaml and report.html"
    )

    for name, help, directory, what in (
        ("export", "Write a model that was quantized here in another tool's format.", "MODEL_DIR", MODEL_HELP),
        ("convert", "Write a quantized checkpoint in another tool's format.", "CHECKPOINT", "quantized checkpoint"),
    ):
        sub = command(name, _export, help)
        sub.add_argument("directory", type=Path, metavar=directory, help=what)
        sub.add_argument("--format", required=True, choices=EXPORT_FORMATS)
        sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="new directory for the result")

    sub = command("generate", _generate, "Continue a prompt with a model.")
    sub.add_argument("directory", type=Path, metavar="DIR", help=MODEL_HELP)
    sub.add_argument("--prompt", required=True)
    sub.add_argument("--max-new-tokens", type=_positive, default=64, metavar="N")

    sub = command("eval", _eval, "Compare a model with its float model, or another one, on a text or other inputs.")
    sub.add_argument("directory", type=Path, metavar="DIR", help=MODEL_HELP)
    reference_help = "what to compare it with: the float model, in float32, or any other that DIR may be"
    sub.add_argument("--reference", type=Path, required=True, metavar="DIR", help=reference_help)
    either = sub.add_mutually_exclusive_group(required=True)
    either.add_argument("--text", type=Path, metavar="FILE")
    inputs(either, "what a model is called with that is not called with text")
    tasks_help = "count changed answers in the multiple-choice tasks of this folder (lm-evaluation-harness' YAML files)"
    either.add_argument("--tasks", type=Path, metavar="DIR", help=tasks_help)
    sub.add_argument("--sequence-length", type=_positive, default=512, metavar="N")
    sub.add_argument("--max-tokens", type=_positive, metavar="N", help="predict at most N tokens of the text")

    sub = command("explain", _explain, "Show how each module of a model is computed.")
    sub.add_argument("directory", type=Path, metavar="DIR", help=MODEL_HELP)

    cli_serving.add_commands(command)

    command("demo", _demo, "Quantize the embedded model in several ways and check the results.")
    return parser


def _find_models(options: argparse.Namespace) -> None:
    """Put the paths of models in the place of their ids in the hub."""
    given = {name: getattr(options, name, None) for name in ("model_dir", "directory", "reference")}
    if not any(given.values()):
        return
    from .llm.saved.repositories import Source, local_path

    for name, model in given.items():
        if model is not None and str(model) != "embedded":
            source = Source() if name == "reference" else Source(revision=options.revision, filename=options.file)
            setattr(options, name, local_path(model, source, options.trust_remote_code))


def _quantize(options: argparse.Namespace) -> int:
    from dataclasses import replace
    from functools import partial

    import torch

    from . import evaluation
    from .conversion.calibration_imatrix import read_imatrix
    from .recipes import inputs
    from .recipes.apply import calibration_data
    from .recipes.load import quantized
    from .recipes.recipe import AutoRound, Calibrated, load_recipe

    if options.bits is not None:
        print(f"--bits {options.bits}: recipe {BEST_RECIPES[options.bits].name}: {BEST_RECIPES[options.bits].why}")
    recipe = load_recipe(options.recipe or BEST_RECIPES[options.bits].name)
    text = options.dataset or options.column or options.samples
    if not isinstance(recipe.settings, Calibrated) and (text or options.inputs):
        raise ValueError(
            f"--dataset, --column, --samples, --inputs: recipe {recipe.name} does not calibrate; leave them out"
        )
    if text and options.inputs:
        raise ValueError("--dataset, --column, --samples: they are for text; leave them out beside --inputs")
    if options.work_dir and not isinstance(recipe.settings, AutoRound):
        raise ValueError(f"--work-dir: recipe {recipe.name} keeps no unfinished work; leave it out")
    if options.samples:
        recipe = replace(recipe, settings=replace(recipe.settings, samples=options.samples))
    imatrix = None if options.imatrix is None else read_imatrix(options.imatrix)
    tokenizer = _tokenizer(options, options.model_dir)
    with new_directory(options.out, "--out") as out:
        calibration = inputs.read_inputs(options.inputs) if options.inputs else ()
        if not options.inputs and tokenizer is not None:
            calibration = _of_dataset(calibration_data, recipe, tokenizer, _mixed(options.dataset), options.column)
        check = None if options.inputs else partial(inputs.check_takes_text, tokenizer=tokenizer)
        dtype = getattr(torch, options.dtype)
        model, before = quantized(
            recipe, options.model_dir, dtype, calibration, check, options.trust_remote_code, options.work_dir, imatrix
        )
        _save(model, out, tokenizer, options.model_dir)
    after = evaluation.model_bytes(model)
    print(f"{options.out}: {recipe.name}, {after / 1e6:.1f} MB in memory, before {before / 1e6:.1f} MB")
    if (cost := recipe.cost) is not None:
        print(f"{recipe.name}: {cost}")
    return 0


def _autotune(options: argparse.Namespace) -> int:
    from contextlib import nullcontext

    from . import data
    from .recipes.recipe import load_recipe

    budget = _has_budget(options)
    if budget and options.max_loss is not None:
        raise ValueError("--max-loss: it is no limit beside --size, --max-kl or --tokens-per-second; leave it out")
    name = options.recipe or (None if budget or options.max_bytes_per_weight is not None else "w8a8-smoothquant")
    recipe = None if name is None else load_recipe(name)
    embedded = options.model_dir == "embedded"
    directory = data.embedded_model_dir() if embedded else Path(options.model_dir)
    if options.text is not None:
        text = options.text.read_text(encoding="utf-8")
    else:
        # The default calibration text and this one have no paragraph in common.
        text = data.held_out_text() if embedded or (budget and options.dataset is None) else None
    with nullcontext() if options.out is None else new_directory(options.out, "--out") as out:
        report = _tune(options, recipe, directory, text, out)
    print(report.table())
    if options.out is not None:
        print(f"{options.out}: the result")
    return 0


def _has_budget(options: argparse.Namespace) -> bool:
    """Whether the divergence from the float model counts, which goes with budgets of size, divergence and speed."""
    return any(each is not None for each in (options.size, options.max_kl, options.tokens_per_second))


def _tune(
    options: argparse.Namespace, recipe: Recipe | None, directory: Path, text: str | None, out: Path | None
) -> Report:
    """Tune, and save the result in `out` if given; RuntimeError if no candidate loses as little as wanted."""
    from .recipes import inputs
    from .recipes.recipe import recipe_yaml
    from .recipes.tune import Tuning

    tokenizer, budget = _tokenizer(options, directory), _has_budget(options)
    samples = options.samples or (64 if budget else 100)
    tuning = Tuning(recipe, tokenizer, samples, options.sequence_length, options.algorithms)
    calibration = inputs.read_inputs(options.inputs) if options.inputs else ()
    if not options.inputs and tokenizer is not None:
        calibration = _of_dataset(tuning.calibration, _mixed(options.dataset), options.column)
    model = _float_model(options, directory, options.dtype)
    if not options.inputs:
        inputs.check_takes_text(model, tokenizer)
    metric = None
    if inputs.predicts_next_tokens(model) and not options.inputs:
        if text is None:
            raise ValueError("--text: expected a file whose perplexity or divergence counts")
        metric = tuning.perplexity(text, options.max_tokens)
        if budget:
            metric = tuning.divergence(_float_model(options, directory, "float32"), text, options.max_tokens)
    elif options.text is not None:
        raise ValueError(f"--text: a {type(model).__name__} has no perplexity; leave it out")
    max_loss = MAX_LOSS if options.max_loss is None else options.max_loss
    model, report = tuning.run(
        model,
        inputs.of_model(model, calibration),
        metric,
        accuracy_criterion=None if budget else {"relative": max_loss},
        max_bytes_per_weight=options.max_bytes_per_weight,
        size=options.size,
        max_kl=options.max_kl,
        tokens_per_second=options.tokens_per_second,
        tuning_time=options.time,
        record=options.record,
        report=options.report or (),
    )
    if not report.met:
        print(report.table())
        limit = "the budget" if budget else f"--max-loss {max_loss}"
        raise RuntimeError(f"no recipe is within {limit}: allow more, or give it more --time")
    if out is not None:
        _save(model, out, tokenizer, directory)
        report.write(out / "report.html")
        if report.weight_only:
            write_whole(out / "recipe.yaml", recipe_yaml(tuning.recipe_of(report)))
    return report


def _export(options: argparse.Namespace) -> int:
    from .checkpoints import find_gguf, find_quantization_config

    gguf = find_gguf(options.directory)
    directory = options.directory if gguf else _model_directory(options.directory)
    if gguf is None and find_quantization_config(directory) is None:
        raise ValueError(f"{directory}: expected a quantized model, got a float one; run `ipex-quant quantize` first")
    with new_directory(options.out, "--out") as out:
        model = _any_model(options)
        from_to_gguf = gguf is not None or options.format == "gguf"
        ipex.llm.export(model, out, options.format, _tokenizer(options, directory) if from_to_gguf else None)
        if not from_to_gguf:
            _copy(directory, out, (*TOKENIZER_FILES, *PROCESSOR_FILES, *("*.py",) * options.trust_remote_code))
        size = sum(file.stat().st_size for file in out.iterdir())
    print(f"{options.out}: {options.format}, {size / 1e6:.1f} MB")
    return 0


def _generate(options: argparse.Namespace) -> int:
    from .demo import continuation
    from .recipes import inputs

    model, tokenizer = _any_model(options), _tokenizer(options, options.directory)
    inputs.check_takes_text(model, tokenizer)
    if not model.can_generate():
        raise ValueError(f"{options.directory}: a {type(model).__name__} does not generate text")
    print(continuation(model, tokenizer, options.prompt, options.max_new_tokens))
    return 0


def _eval(options: argparse.Namespace) -> int:
    from . import evaluation
    from .recipes import inputs

    text = None if options.text is None else options.text.read_text(encoding="utf-8")
    calls = None if options.inputs is None else inputs.read_inputs(options.inputs)
    model, tokenizer = _any_model(options), _tokenizer(options, options.directory)
    reference = _reference(options)
    if type(reference).__name__ != type(model).__name__:
        raise ValueError(f"--reference: expected a {type(model).__name__}, got a {type(reference).__name__}")
    if options.tasks is not None:
        return _flips(options, reference, model, tokenizer)
    float_size, size = (f"{evaluation.model_bytes(each) / 1e6:.1f} MB" for each in (reference, model))
    if calls is None and inputs.predicts_next_tokens(model):
        result = evaluation.compare(reference, model, tokenizer, text, options.sequence_length, options.max_tokens)
        print(f"tokens                {result.tokens}")
        print(f"reference perplexity  {result.reference_perplexity:.4f}  ({float_size})")
        print(f"perplexity            {result.perplexity:.4f}  ({size})")
        print(f"KL(reference||model)  {result.kl_divergence:.6f} nats per token")
        print(f"KL, 99th percentile   {result.kl_99th_percentile:.6f}")
        print(f"KL, largest           {result.kl_largest:.6f}")
        print(f"top-1 agreement       {result.top1_agreement:.2%}")
        return 0
    if calls is None:
        calls = inputs.text_batches(model, tokenizer, text, options.sequence_length, options.max_tokens)
    pairs = zip(inputs.of_model(reference, calls), inputs.of_model(model, calls), strict=True)
    outputs = evaluation.compare_outputs(reference, model, pairs)
    print(f"samples               {outputs.samples}  ({float_size}, {size})")
    print(f"error of the outputs  {outputs.error:.6f} relative")
    if outputs.top1_agreement is not None:
        print(f"KL(reference||model)  {outputs.kl_divergence:.6f} nats per prediction")
        print(f"top-1 agreement       {outputs.top1_agreement:.2%}")
    return 0


def _flips(
    options: argparse.Namespace,
    reference: PreTrainedModel,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
) -> int:
    try:
        from .integrations.lm_eval import IpexQuantLM, flips
    except ImportError as error:
        raise ValueError("--tasks: expected lm-evaluation-harness; run `pip install ipex_quant[lm-eval]`") from error
    reference, model = (IpexQuantLM(each, tokenizer=tokenizer) for each in (reference, model))
    for task, found in flips(reference, model, options.tasks).items():
        print(f"{task}: {found.changed} of {found.questions} answers changed ({found.changed / found.questions:.2%})")
        print(f"  right before, wrong now  {found.lost}")
        print(f"  wrong before, right now  {found.gained}")
        print(f"  accuracy                 {found.reference_accuracy:.2%} before, {found.accuracy:.2%} now")
    return 0


def _explain(options: argparse.Namespace) -> int:
    ipex.explain(_any_model(options))
    return 0


def _demo(options: argparse.Namespace) -> int:
    from transformers.utils.logging import disable_progress_bar

    from . import demo

    disable_progress_bar()  # a line for each of a dozen loads and saves would bury the table
    return demo.run()


def _any_model(options: argparse.Namespace) -> PreTrainedModel:
    return ipex.llm.from_pretrained(options.directory, trust_remote_code=options.trust_remote_code)


def _reference(options: argparse.Namespace) -> PreTrainedModel:
    """The model to compare with: a float model in float32, another one as it runs, with activations in float32."""
    import torch

    from .checkpoints import find_gguf, find_quantization_config

    path = options.reference
    if find_gguf(path) is None and find_quantization_config(_model_directory(path)) is None:
        return _float_model(options, path, "float32")
    return ipex.llm.from_pretrained(path, torch.float32, trust_remote_code=options.trust_remote_code)


def _float_model(options: argparse.Namespace, directory: Path, dtype: str) -> PreTrainedModel:
    import torch

    from .llm.loading import load_float

    return load_float(directory, getattr(torch, dtype), options.trust_remote_code)


def _tokenizer(options: argparse.Namespace, directory: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer in `directory`, or in a GGUF file; None for a model of images or sounds without one."""
    names = {file.name for file in directory.iterdir()} if directory.is_dir() else set()
    if names.intersection(PROCESSOR_FILES) and not names & {"tokenizer_config.json", "tokenizer.json"}:
        return None
    return ipex.llm.load_tokenizer(directory, options.trust_remote_code)


def _save(model: PreTrainedModel, out: Path, tokenizer: PreTrainedTokenizerBase | None, source: Path) -> None:
    """Save a quantized model with its tokenizer and the processor files of the float model in `source`."""
    ipex.llm.save(model, out, tokenizer)
    _copy(source, out, PROCESSOR_FILES)


def _copy(source: Path, out: Path, patterns: Sequence[str]) -> None:
    """Copy the files in `source` whose names match one of `patterns`, unless `out` has them."""
    for file in sorted({file for pattern in patterns for file in source.glob(pattern)}):
        if file.is_file() and not (out / file.name).exists():
            shutil.copy(file, out / file.name)


def _add_dataset(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--dataset",
        action="append",
        metavar="FILE_OR_NAME[:WEIGHT]",
        help="calibration text: a .txt, .json, .jsonl or .parquet file, of text or of conversations (messages), or a "
        "name on the hub (default: Python's docs); several are mixed by their weights (default 1)",
    )


def _mixed(datasets: Sequence[str] | None) -> str | dict[str, float] | None:
    """The source that the values of --dataset are: one by itself, or several with their weights."""
    if not datasets:
        return None
    weights = {}
    for each in datasets:
        name, colon, weight = each.rpartition(":")
        if not colon or Path(each).exists() or not re.fullmatch(r"\d+(\.\d+)?", weight):
            name, weight = each, "1"
        if name in weights:
            raise ValueError(f"--dataset: {name} is given twice; give it a weight")
        weights[name] = float(weight)
    return next(iter(weights)) if len(weights) == 1 else weights


def _of_dataset(read: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return read(*arguments)
    except RuntimeError as error:  # the hub has no such dataset, or cannot be reached
        raise ValueError(f"--dataset: {error}") from error


def _model_directory(path: Path) -> Path:
    if not (path / "config.json").is_file():
        raise ValueError(f"{path}: expected a model directory with a config.json")
    return path


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)
