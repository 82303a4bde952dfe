"""Run a script that was written for Intel Extension for PyTorch, unchanged.

    python -m ipex_quant.run script.py [arguments]
    python -m ipex_quant.run -m module [arguments]

The script sees what it would see below `python` itself, but ``import intel_extension_for_pytorch`` leads to this
package: in its process, and in Python processes that it starts.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from . import alias

USAGE = "usage: python -m ipex_quant.run script.py [arguments]\n       python -m ipex_quant.run -m module [arguments]"

CHILDREN = str(Path(alias.__file__).parent / "children")
"""The directory whose sitecustomize.py gives the alias to Python processes that find it on PYTHONPATH."""


def main(arguments: Sequence[str]) -> None:
    """Run the script or module that `arguments` begin with, as ``__main__``; errors and SystemExit are its own.

    Changes `sys.argv`, `sys.path` and PYTHONPATH of this process for it.
    """
    if arguments and arguments[0] in ("-h", "--help"):
        print(USAGE)
        return
    as_module = arguments[:1] == ["-m"]
    target = arguments[as_module:]
    if not target or target[0].startswith("-"):
        print(USAGE, file=sys.stderr)
        sys.exit(2)
    alias.install_as_ipex()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [CHILDREN, os.environ.get("PYTHONPATH")]))
    sys.argv = list(target)
    if as_module:
        runpy.run_module(target[0], run_name="__main__", alter_sys=True)
        return
    if not getattr(sys.flags, "safe_path", False):  # from Python 3.11 on
        sys.path[0] = str(Path(target[0]).resolve().parent)
    runpy.run_path(target[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
