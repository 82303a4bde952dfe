"""Computing on chosen cores: pinned code, asynchronous tasks, and modules that run a batch in several streams."""

from .cpupool import CPUPool, pin
from .multi_stream import (
    MultiStreamBenchmarkModule,
    MultiStreamModule,
    MultiStreamModuleHint,
    get_default_num_streams,
)
from .runtime_utils import get_core_list_of_node_id, is_runtime_ext_enabled
from .task import Task

_MultiStreamBenchmarkModule = MultiStreamBenchmarkModule  # IPEX's name for it

__all__ = [
    "CPUPool",
    "MultiStreamBenchmarkModule",
    "MultiStreamModule",
    "MultiStreamModuleHint",
    "Task",
    "get_core_list_of_node_id",
    "get_default_num_streams",
    "is_runtime_ext_enabled",
    "pin",
]
