"""The name ``intel_extension_for_pytorch`` for this package, in processes that ask for it.

`install_as_ipex` lets scripts that were written for Intel Extension for PyTorch (IPEX) run unchanged; ``python -m
ipex_quant.run script.py`` calls it for them. Until it is called, nothing in a process is different.
"""

from __future__ import annotations

import sys

from .finder import IPEX, AliasFinder

__all__ = ["IPEX", "install_as_ipex", "uninstall_as_ipex"]


def install_as_ipex() -> None:
    """Let ``import intel_extension_for_pytorch`` mean this package, in this process.

    IPEX's public modules then lead to this package's, under IPEX's paths; a name that this package has not raises
    AttributeError or ImportError. As with IPEX, its first import changes torch, until `uninstall_as_ipex`:

    - `torch.compile` has a backend "ipex", which is inductor, and without a C++ compiler runs the model as it is, with
      a warning;
    - `torch.jit.trace` works under autocast (its cache of cast weights is off meanwhile);
    - a traced graph runs under autocast with the casts it was traced with, and no others;
    - ``Tensor.numpy`` of a bfloat16 tensor is a float32 array;
    - ``torch.xpu.optimize`` is `optimize` without what is for CPUs, and a RuntimeError where torch finds no XPU;
    - modules that `quantization.convert` made for dynamic INT8 are instances of ``torch.nn.quantized.dynamic.Linear``;
    - the logger "IPEX" has the messages of the logger "ipex_quant", which passes them to no other one.

    Calling it again changes nothing. Processes that this one starts do not inherit it, except below ``ipex_quant.run``.

    Raises:
        RuntimeError: IPEX itself was imported before.
    """
    if _installed() is not None:
        return
    if IPEX in sys.modules:
        raise RuntimeError(f"{IPEX} was imported already: call install_as_ipex before the first import of it")
    sys.meta_path.insert(0, AliasFinder())


def uninstall_as_ipex() -> None:
    """Take back what `install_as_ipex` did; objects that were imported by the name go on working."""
    finder = _installed()
    if finder is None:
        return
    sys.meta_path.remove(finder)
    finder.undo_effects()
    for name in [name for name in sys.modules if name == IPEX or name.startswith(f"{IPEX}.")]:
        del sys.modules[name]


def _installed() -> AliasFinder | None:
    return next((finder for finder in sys.meta_path if isinstance(finder, AliasFinder)), None)
