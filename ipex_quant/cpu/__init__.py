"""What concerns the CPU's cores and threads: binding, streams, and the launcher behind `ipexrun`."""

from . import runtime

__all__ = ["runtime"]
