"""Computing linear layers that read one tensor in one matrix product."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from functools import partial

from torch import fx, nn

from ..conversion.description import is_pretrained
from ..conversion.example import Example
from ..nn.prepacked import PrepackedLinear, prepack
from ..nn.prepacked_group import GroupedLinear, LinearGroup
from ..smoothquant.tracing import trace_groups
from .parts import traced_parts

logger = logging.getLogger("ipex_quant")


def concat_linears(model: nn.Module, example: Example | None) -> None:
    """Join the prepacked linear layers of `model` that have one parent and read one tensor, in place.

    They are found in a run of `example`, or for a transformers model of its dummy inputs, or else by `torch.fx`.
    """
    names = {name for name, module in model.named_modules() if type(vars(module).get("forward")) is PrepackedLinear}
    for members in _groups_of_run(model, names, example) or _groups_of_graphs(model, names):
        modules = [model.get_submodule(name) for name in members]
        group = LinearGroup(modules)
        for index, module in enumerate(modules):
            prepack(GroupedLinear(module, group, index))
        logger.info("concat_linear: %s", ", ".join(members))


def _groups_of_run(model: nn.Module, names: Collection[str], example: Example | None) -> list[tuple[str, ...]]:
    dummy = example is None and is_pretrained(model)
    if dummy:
        example = Example(kwargs=model.dummy_inputs)
    if example is None:
        return []
    try:
        groups = trace_groups(model, names, (), partial(example.run, model))
    except ValueError as error:
        if not dummy:
            raise
        logger.debug("no example to find linear layers that share an input with: %r", error)
        return []
    return [group.members for group in groups if len(group.members) > 1]


def _groups_of_graphs(model: nn.Module, names: Collection[str]) -> Iterator[tuple[str, ...]]:
    for prefix, graph in traced_parts(model, (nn.Linear,)):
        calls = [node for node in graph.nodes if node.op == "call_module" and prefix + str(node.target) in names]
        groups: dict[tuple[fx.Node, str], list[str]] = {}
        for node in calls:
            source = node.args[0] if len(node.args) == 1 and not node.kwargs else None
            if isinstance(source, fx.Node) and not any(_writes(user) for user in source.users):
                parent = str(node.target).rpartition(".")[0]
                groups.setdefault((source, parent), []).append(prefix + str(node.target))
        once = {name for name in names if sum(prefix + str(node.target) == name for node in calls) == 1}
        yield from (tuple(members) for members in groups.values() if len(members) > 1 and once.issuperset(members))


def _writes(node: fx.Node) -> bool:
    """Whether a use of a tensor may change it."""
    name = str(getattr(node.target, "__name__", node.target))
    return (name.endswith("_") and not name.endswith("__")) or bool(node.kwargs.get("inplace"))
