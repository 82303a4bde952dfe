"""Which modules of a model alone read another's output, found by `torch.fx` or in a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import fx, nn

from ..conversion.example import Example
from ..smoothquant.tracing import trace_groups


@dataclass(frozen=True)
class Pair:
    """Names of a module and of the one that alone reads its output, of `rank` dimensions if that is known."""

    producer: str
    reader: str
    rank: int | None = None


def sole_readers(
    model: nn.Module, producers: Collection[str], readers: Collection[str], example: Example | None
) -> list[Pair]:
    """The pairs of the named `producers` and `readers`, each called once, in `model`.

    What reads an output is found by `torch.fx`. Where that cannot trace the model, it is found in a run of `example`,
    or else in the parts that it can trace: that code outside of a part reads an output inside is not expected.
    """
    if not producers or not readers:
        return []
    graphs = traced_parts(model, {type(model.get_submodule(name)) for name in readers})
    if example is not None and [prefix for prefix, _ in graphs] != [""]:
        groups = trace_groups(model, readers, producers, partial(example.run, model))
        found = [Pair(g.producer, g.members[0], g.rank) for g in groups if g.producer and len(g.members) == 1]
    else:
        found = _pairs(model, graphs)
    return [pair for pair in found if pair.producer in producers and pair.reader in readers]


def traced_parts(model: nn.Module, kinds: Collection[type[nn.Module]]) -> list[tuple[str, fx.Graph]]:
    """The graph of `model`, or, where fx cannot trace it, those of its largest parts that contain modules of `kinds`.

    Each comes with the prefix of the names in it. The model is the same afterwards.
    """
    with _unchanged(model):
        return list(_graphs(model, kinds, ""))


def _pairs(model: nn.Module, graphs: Sequence[tuple[str, fx.Graph]]) -> list[Pair]:
    found, calls = [], Counter[nn.Module]()
    exposed: set[nn.Module] = set()
    for prefix, graph in graphs:
        for node in graph.nodes:
            name = prefix + str(node.target)
            if node.op == "get_attr":
                exposed.add(model.get_submodule(name.rpartition(".")[0]))
            if node.op != "call_module":
                continue
            calls[model.get_submodule(name)] += 1
            source = _source(node)
            while source is not None and type(model.get_submodule(prefix + str(source.target))) is nn.Identity:
                source = _source(source)
            if source is not None:
                found.append(Pair(prefix + str(source.target), name))
    once = {module for module, count in calls.items() if count == 1} - exposed
    return [p for p in found if once.issuperset(model.get_submodule(name) for name in (p.producer, p.reader))]


def _source(node: fx.Node) -> fx.Node | None:
    """The module call whose output the module call `node` alone reads, and reads alone; None if there is none."""
    source = node.args[0] if len(node.args) == 1 and not node.kwargs else None
    if isinstance(source, fx.Node) and source.op == "call_module" and len(source.users) == 1:
        return source
    return None


def _graphs(module: nn.Module, kinds: Collection[type[nn.Module]], prefix: str) -> Iterator[tuple[str, fx.Graph]]:
    try:
        yield prefix, _Tracer(kinds).trace(module)
    except Exception:  # whatever foreign code does with a value that it cannot know
        for name, child in module.named_children():
            if any(type(part) in kinds for part in child.modules() if part is not child):
                yield from _graphs(child, kinds, f"{prefix}{name}.")


class _Tracer(fx.Tracer):
    """Does not trace into modules of the given `kinds`."""

    def __init__(self, kinds: Collection[type[nn.Module]]) -> None:
        super().__init__()
        self._kinds = kinds

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return type(module) in self._kinds or super().is_leaf_module(module, name)


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Undo what code that runs within the context does to attributes of `model` and of its parts."""
    before: dict[nn.Module, dict[str, Any]] = {
        module: {name: value.copy() if type(value) is dict else value for name, value in vars(module).items()}
        for module in model.modules()
    }
    try:
        yield
    finally:
        for module, attributes in before.items():
            module.__dict__.clear()
            module.__dict__.update(attributes)
