"""Hooks of mkdocs that replace ``<!-- generated: NAME -->`` in a page by a table of the package's data.

mkdocs calls `on_page_markdown` (see `hooks` in mkdocs.yml). The package is read, not imported: the environment that
builds the site has no torch.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

PACKAGE = Path(__file__).resolve().parent.parent / "ipex_quant"
MARK = re.compile(r"<!-- generated: (\w+) -->")

POSITIONS = {
    "NONE": "none inside the layer",
    "HALF": "rotary, halves",
    "INTERLEAVED": "rotary, interleaved",
    "TWICE": "rotary, interleaved",
    "SINES": "rotary, interleaved",
    "TABLE": "rotary, interleaved",
}
RESIDUALS = {
    "SEQUENTIAL": "pre-norm",
    "PARALLEL": "parallel attention and MLP",
    "POST_NORM": "post-norm",
    "NORMED": "pre-norm, residual of the normed input",
    "SANDWICH": "norms or factors after each part",
}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return `markdown` with each mark replaced by its table; ValueError for a name that is not in `TABLES`."""

    def filled(mark: re.Match[str]) -> str:
        if mark[1] not in TABLES:
            raise ValueError(f"generated: expected one of {sorted(TABLES)}, got {mark[1]!r}")
        return TABLES[mark[1]]()

    return MARK.sub(filled, markdown)


def families() -> str:
    """A table of the decoder layers that are fused, with their position embedding, order of norms and MLP."""
    module = _module(next(PACKAGE.glob("llm/**/families.py")))
    rows = []
    for name, ways in module.FAMILIES.items():
        positions = (_positions(way.attention) for way in ways)
        residuals = (RESIDUALS[way.residual.name] for way in ways)
        rows.append((f"`{name}`", _joined(positions), _joined(residuals), _joined(map(_mlp, ways))))
    return _table(("decoder layer in transformers", "positions", "layer", "MLP"), rows)


def recipes() -> str:
    """A table of the packaged recipes, with their measured costs."""
    costs = json.loads((PACKAGE / "recipes" / "costs.json").read_text(encoding="utf-8"))
    rows = []
    for path in sorted((PACKAGE / "recipes").glob("*.yaml")):
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        rows.append((f"`{path.stem}`", settings["description"], *_cost(costs["recipes"].get(path.stem))))
    table = _table(("recipe", "what it does", "perplexity", "KL", "top-1", "MB"), rows)
    return (
        f"{table}\n\nMeasured on {costs['model']} with {costs['tokens']} tokens of {costs['text']}, of which float32 "
        f"makes a perplexity of {costs['perplexity']:.2f}. KL is the divergence from float32 in nats per token; top-1 "
        "is the share of tokens for which both predict the same."
    )


TABLES: dict[str, Callable[[], str]] = {"families": families, "recipes": recipes}


def _positions(attention: Any) -> str:
    if attention.alibi:
        return "ALiBi"
    return "relative bias" if attention.position_bias else POSITIONS[attention.rope.name]


def _mlp(family: Any) -> str:
    if family.mlp is None:
        return "experts"
    return "gated" if family.mlp.gated else "plain"


def _cost(cost: dict[str, float] | None) -> tuple[str, ...]:
    if cost is None:
        return ("", "", "", "")
    return (
        f"{cost['perplexity']:.2f}",
        f"{cost['kl_divergence']:.4f}",
        f"{cost['top1_agreement']:.1%}",
        f"{cost['megabytes']:.1f}",
    )


def _joined(cells: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(cells))


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _module(path: Path) -> Any:
    """Import the module in a file, which may import only the standard library."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up annotations there
    spec.loader.exec_module(module)
    return module
