"""Check the layers of imports, and where native code includes torch and uses intrinsics.

Python: a module of `ipex_quant` may import its own package and packages of lower layers. There are no circles of
imports, no imports of private names, and no imports by a string except in the lazy public face and the alias.
Native: only `csrc/ops/` includes torch headers; only `csrc/simd*.h` contain intrinsics.
Prints one line per violation and exits with 1 if there is any.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "ipex_quant"

LAYERS: tuple[tuple[str, ...], ...] = (
    ("numerics", "data", "errors", "reading", "writing", "_C"),
    ("ops",),
    ("checkpoints",),
    ("nn", "optim", "cpu"),
    ("observers", "smoothquant", "woq", "evaluation"),
    ("conversion",),
    ("llm",),
    ("autotune",),
    ("frontend",),
    ("bert",),
    ("quantization", "settings", "verbosity"),  # the faces: these, which IPEX names, and `ipex_quant/__init__.py`
    ("alias",),
    (PACKAGE,),
    ("recipes",),
    ("demo_encoders", "integrations"),
    ("demo",),
    ("cli_serving",),
    ("cli", "run"),
)
"""Modules and subpackages of the package, lowest layer first. Parts of one layer do not import each other."""

RANK = {name: level for level, names in enumerate(LAYERS) for name in names}

BY_STRING = (PACKAGE, f"{PACKAGE}.alias.finder")
"""The modules that import by a string: they look names up."""

NOT_PRIVATE = ("_C", "__version__")

NATIVE_SUFFIXES = (".cpp", ".h")
TORCH_FILES = "csrc/ops/*"
TORCH_INCLUDE = re.compile(r"^\s*#\s*include\s*[<\"](torch|ATen|c10)/")
SIMD_FILES = "csrc/simd*.h"
INTRINSIC = re.compile(r"\b_mm\d*_\w+|\b__m(128|256|512)[a-z]*\b|#\s*include\s*<\w*intrin\.h>")
LINE_COMMENT = re.compile(r"//.*")


def main() -> int:
    """Check the repository of this file; return the exit status, 1 if there is a violation."""
    root = Path(__file__).resolve().parent.parent
    violations = [*python_violations(root), *shape_violations(root), *native_violations(root)]
    print("\n".join(violations) or "check_imports: every import goes down, and none in a circle")
    return 1 if violations else 0


def python_violations(root: Path) -> list[str]:
    """One line per import in `root/ipex_quant` that is not of a lower layer, and per module without a layer."""
    violations = []
    for name, path in modules_of(root).items():
        file = path.relative_to(root)
        own = layer_of(root, name)
        if own not in RANK:
            violations.append(f"{file}: {own} has no layer; add it to LAYERS in tools/check_imports.py")
            continue
        for line, module in imported_modules(ast.parse(path.read_text(encoding="utf-8")), file.parts[:-1]):
            other = layer_of(root, module)
            if other in RANK and other != own and RANK[other] >= RANK[own]:
                violations.append(f"{file}:{line}: {own} imports {other}, which is not below it")
    return violations


def shape_violations(root: Path) -> list[str]:
    """One line per circle of imports, and per import of a private name or by a string, in `root/ipex_quant`."""
    violations = []
    modules = modules_of(root)
    imports: dict[str, set[str]] = {name: set() for name in modules}
    for name, path in modules.items():
        file = path.relative_to(root)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for line, module in imported_modules(tree, file.parts[:-1]):
            holder, _, last = module.rpartition(".")
            if module.startswith(f"{PACKAGE}.") and last.startswith("_") and last not in NOT_PRIVATE:
                violations.append(f"{file}:{line}: {last} of {holder} is private")
            other = module if module in imports else holder
            if other in imports and last not in NOT_PRIVATE:
                imports[name].add(other)
        if name not in BY_STRING:
            violations += [f"{file}:{line}: imports by a string" for line in string_imports(tree)]
    return violations + [f"circle of imports: {' -> '.join([*circle, circle[0]])}" for circle in circles(imports)]


def modules_of(root: Path) -> dict[str, Path]:
    """Path of every module of the package by its dotted name."""
    paths = sorted((root / PACKAGE).rglob("*.py"))
    return {".".join(p.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): p for p in paths}


def string_imports(tree: ast.AST) -> Iterator[int]:
    """Lines that call `import_module` or `__import__`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            if name in ("import_module", "__import__"):
                yield node.lineno


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Circles of imports, each as a list of module names."""
    found, done = [], set()

    def walk(name: str, way: list[str]) -> None:
        if name in way:
            found.append(way[way.index(name) :])
        elif name not in done:
            for other in sorted(imports[name]):
                walk(other, [*way, name])
            done.add(name)

    for name in imports:
        walk(name, [])
    return found


def native_violations(root: Path) -> list[str]:
    """One line per torch include and per intrinsic in a file of `root/csrc` that must not have one."""
    violations = []
    for path in sorted(p for p in (root / "csrc").rglob("*") if p.suffix in NATIVE_SUFFIXES):
        file = path.relative_to(root)
        for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            code = LINE_COMMENT.sub("", text)
            if TORCH_INCLUDE.search(code) and not file.match(TORCH_FILES):
                violations.append(f"{file}:{number}: torch headers belong in {TORCH_FILES} only")
            if (found := INTRINSIC.search(code)) and not file.match(SIMD_FILES):
                violations.append(f"{file}:{number}: {found.group()} belongs in {SIMD_FILES} only")
    return violations


def layer_of(root: Path, module: str) -> str | None:
    """The part of the package that a dotted module name belongs to; None outside the package."""
    package, *names = module.split(".")
    if package != PACKAGE:
        return None
    # `from ipex_quant import x`: x is a module of the package, or else an attribute of the public face.
    is_module = names and (
        names[0] in RANK or any((root / PACKAGE / name).exists() for name in (names[0], f"{names[0]}.py"))
    )
    return names[0] if is_module else PACKAGE


def imported_modules(tree: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Line and absolute name of all imports of a module in `package`, also of those inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *filter(None, [node.module])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


if __name__ == "__main__":
    sys.exit(main())
