"""``intel_extension_for_pytorch.version``."""

from . import names

__all__ = ["__version__"]

__version__ = names.VERSION
