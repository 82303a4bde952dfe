"""``intel_extension_for_pytorch._C``: what public scripts ask of it."""

from __future__ import annotations

from ..cpu.binding import bind
from ..cpu.runtime import CPUPool


def get_current_cpu_pool() -> CPUPool:
    """The cores that the calling thread may run on."""
    return CPUPool()


def set_cpu_pool(cpu_pool: CPUPool) -> None:
    """Compute on the cores of `cpu_pool` from now on, in the calling thread."""
    bind(cpu_pool.core_ids)
