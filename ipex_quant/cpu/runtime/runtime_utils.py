"""What the machine offers: whether threads can be bound, and the cores of a NUMA node."""

from __future__ import annotations

import os

import torch

from ..topology import node_processors, one_a_core


def is_runtime_ext_enabled() -> bool:
    """Whether threads can be bound and counted here: on Linux, with a torch that computes on OpenMP's threads.

    Nothing has to be preloaded for it.
    """
    return hasattr(os, "sched_setaffinity") and "parallel backend: OpenMP" in torch.__config__.parallel_info()


def get_core_list_of_node_id(node_id: int) -> list[int]:
    """The first processor of every core of a NUMA node, in ascending order, whether or not this process may use it.

    Raises ValueError, which lists the nodes, if there is no such node.
    """
    return one_a_core(node_processors(node_id))
