"""`ipex-quant serve` and `chat`: the servers of vLLM and of transformers, and transformers' chat, with this package.

HTTP is theirs, and so are all options that are not described here: they are passed on.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

logger = logging.getLogger("ipex_quant")

ENGINES = ("auto", "vllm", "transformers")
NEEDED = ("fastapi", "uvicorn", "openai", "pydantic", "accelerate", "psutil")
"""What transformers' server imports, and its memory of keys and values asks for the size of the machine's."""

INTERRUPTED = 130
"""The exit status after Ctrl-C."""

BATCHING, NO_BATCHING = "--continuous-batching", "--no-continuous-batching"
LAYERS = {"full_attention", "sliding_attention"}
"""Types of layers whose keys and values transformers' paged cache holds."""

Add = Callable[[str, Callable[[argparse.Namespace], int], str], argparse.ArgumentParser]


def add_commands(add: Add) -> None:
    """Add the commands by `add`, which takes a name, a function and a line of help."""
    sub = add("serve", _serve, "Serve a model by OpenAI's protocol. Further options are those of the engine.")
    sub.add_argument(
        "directories",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="result of `ipex-quant quantize`, a checkpoint that another tool quantized, a GGUF file, or a float "
        "model; or its id in the hub. Several are served by transformers, each loaded when the first request names it",
    )
    sub.add_argument(
        "--engine",
        choices=ENGINES,
        default="auto",
        help="what serves; auto is vllm if it is installed, else transformers",
    )
    sub.set_defaults(passes_on=True)
    sub = add("chat", _chat, "Chat with a model that is served. Further arguments are those of `transformers chat`.")
    sub.add_argument("model", metavar="DIR", help="what `ipex-quant serve` was given")
    sub.set_defaults(passes_on=True)


def _serve(options: argparse.Namespace) -> int:
    from .checkpoints import find_gguf
    from .llm.loading import model_directory

    models = {path: find_gguf(path) for path in options.directories}
    for path, gguf in models.items():
        if gguf is None:
            model_directory(path)
    engine, plain = options.engine, not any(models.values())
    if engine == "auto":
        engine = "vllm" if _installed("vllm") and plain and len(models) == 1 else "transformers"
    rest = [*options.rest, *["--trust-remote-code"] * options.trust_remote_code]
    if engine == "vllm":
        if len(models) > 1:
            raise ValueError("--engine vllm: it serves one model; start a server for each, or leave the option out")
        ((path, gguf),) = models.items()
        return _serve_by_vllm(gguf or path, rest)
    _check_installed(NEEDED, "transformers' server")
    reasons = [_reason_to_wait(path, gguf, options.trust_remote_code) for path, gguf in models.items()]
    reason = next(filter(None, reasons), None)
    if reason is None and BATCHING not in rest and NO_BATCHING not in rest:
        rest.append(BATCHING)
    why = f" since {reason}" if reason else ""
    sampled = "requests in batches, all sampled as the first one asks"  # transformers has one sampler for all of them
    batching = sampled if BATCHING in rest else f"one request after the other{why}"
    names = [str(path) if gguf is None else f"{gguf.parent}:{gguf.name}" for path, gguf in models.items()]
    return _serve_by_transformers(names, rest, batching)


def _reason_to_wait(path: Path, gguf: Path | None, trust_remote_code: bool) -> str | None:
    """Why transformers serves one request to a model after the other; None if it batches them."""
    from .checkpoints import find_quantization_config

    if gguf is not None or find_quantization_config(path) is not None:
        return _reason_against_batching(path, gguf, trust_remote_code)
    logger.warning("%s is a float model: transformers serves it as it is; `ipex-quant quantize` makes it fast", path)
    return "it is a float model"


def _serve_by_vllm(path: Path, rest: Sequence[str]) -> int:
    if not _installed("vllm"):
        raise ValueError("--engine vllm: vLLM is not installed; run `pip install ipex_quant[vllm]`, or leave it out")
    print(f"ipex-quant serve: vLLM serves {path}", flush=True)
    os.execv(sys.executable, [sys.executable, "-m", "ipex_quant.integrations.vllm.serve", str(path), *rest])


def _serve_by_transformers(names: Sequence[str], rest: Sequence[str], batching: str) -> int:
    import transformers
    from transformers.cli.serve import Serve

    from . import llm

    llm.register_with_transformers()
    print(
        f"ipex-quant serve: transformers {transformers.__version__} serves {', '.join(names)}, {batching}", flush=True
    )
    one = names if len(names) == 1 else []  # a server without a name loads what requests name
    try:
        return _run(Serve, "serve", [*one, *rest])
    except KeyboardInterrupt:
        _leave(INTERRUPTED)
        raise
    except SystemExit as ended:
        _leave(ended.code if isinstance(ended.code, int) else int(ended.code is not None))
        raise


def _leave(status: int) -> None:
    """End the process if a thread would keep it: the one that batches goes on after the server of transformers."""
    if any(thread is not threading.current_thread() and not thread.daemon for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _chat(options: argparse.Namespace) -> int:
    _check_installed(("rich",), "transformers' chat")
    from transformers.cli.chat import Chat

    from . import llm  # noqa: F401  registers what generation configurations may name

    return _run(Chat, "chat", [options.model, *options.rest])


def _run(command: Any, name: str, arguments: Sequence[str]) -> int:
    """Run a `command` of transformers with its `arguments`; its errors of usage exit as those of any command."""
    import typer

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    app(list(arguments), prog_name=f"ipex-quant {name}", standalone_mode=True)
    return 0


def _reason_against_batching(path: Path, gguf: Path | None, trust_remote_code: bool) -> str | None:
    """Why transformers cannot batch the requests to this model continuously; None if it can."""
    from transformers import AutoConfig

    from .checkpoints import open_gguf
    from .llm.gguf import gguf_config
    from .llm.saved.float_models import model_class

    if gguf is not None:
        config = gguf_config(open_gguf(gguf))
    else:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    return _reason_of(model_class(path, {"architectures": config.architectures}, trust_remote_code), config)


def _reason_of(kind: Any, config: PreTrainedConfig) -> str | None:
    from .llm.cache.naming import cache_name

    text = config.get_text_config(decoder=True)
    types = set(getattr(text, "layer_types", None) or ())
    if not types <= LAYERS:
        return f"the paged cache has no layers of {', '.join(sorted(types - LAYERS))}"
    takes_caches = hasattr(kind, "init_continuous_batching") and cache_name(kind.forward) is not None
    if config.is_encoder_decoder or not takes_caches:
        return f"a {kind.__name__} has no continuous batching"
    if not kind._can_set_attn_implementation() or getattr(text, "alibi", False):
        return f"a {kind.__name__} has an attention of its own"
    return None


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _check_installed(names: Sequence[str], what: str) -> None:
    missing = [name for name in names if not _installed(name)]
    if missing:
        raise ValueError(f"{what} needs {', '.join(missing)}; run `pip install ipex_quant[serving]`")
