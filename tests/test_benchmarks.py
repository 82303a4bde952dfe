"""What the benchmarks import from the package exists: they run too rarely to notice by themselves."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[1] / "benchmarks").glob("*.py"))


def imported(script: Path) -> list[tuple[str, str]]:
    """Modules of the package, and the names that a script imports from them."""
    nodes = list(ast.walk(ast.parse(script.read_text(encoding="utf-8"))))
    found = [(node.module, alias.name) for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names]
    return [(module, name) for module, name in found if module and module.partition(".")[0] == "ipex_quant"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_names_exist(script):
    missing = []
    for module, name in imported(script):
        if not hasattr(importlib.import_module(module), name):
            try:
                importlib.import_module(f"{module}.{name}")
            except ImportError:
                missing.append(f"{module}.{name}")
    assert missing == []


def test_the_benchmarks_are_found():
    assert any(imported(script) for script in SCRIPTS)
