"""The processors of this machine, as Linux describes them under ``/sys``: cores, their hardware threads, NUMA nodes.

A *processor* is what the system schedules on, a hardware thread of a core. Where ``/sys`` does not tell, as in some
sandboxes, every processor counts as a core of its own, and all of them as node 0.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

_NODES = Path("/sys/devices/system/node")
_PROCESSORS = Path("/sys/devices/system/cpu")


def numa_nodes() -> dict[int, list[int]]:
    """The processors of each NUMA node that has any."""
    files = {int(path.name.removeprefix("node")): path / "cpulist" for path in _NODES.glob("node[0-9]*")}
    nodes = {node: parse_list(file.read_text()) for node, file in sorted(files.items()) if file.exists()}
    return {node: processors for node, processors in nodes.items() if processors} or {
        0: list(range(os.cpu_count() or 1))
    }


def node_processors(node_id: int) -> list[int]:
    """The processors of a NUMA node.

    Raises ValueError, which lists the nodes, if there is no such node.
    """
    nodes = numa_nodes()
    if node_id not in nodes:
        raise ValueError(f"node_id: expected one of the NUMA nodes {list(nodes)}, got {node_id!r}")
    return nodes[node_id]


def one_a_core(processors: Iterable[int]) -> list[int]:
    """The first of `processors` on each core, in ascending order: hardware threads of a core share its units."""
    first: dict[str, int] = {}
    for processor in sorted(processors):
        file = _PROCESSORS / f"cpu{processor}" / "topology" / "thread_siblings_list"
        first.setdefault(file.read_text() if file.exists() else str(processor), processor)
    return list(first.values())


def parse_list(text: str) -> list[int]:
    """The numbers of a list such as ``"0-3,8"``, the form that Linux and command lines use.

    Raises ValueError if `text` is none.
    """
    numbers: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, dash, last = part.partition("-")
        numbers += range(int(first), int(last if dash else first) + 1)
    return numbers
