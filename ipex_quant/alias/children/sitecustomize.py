"""Gives the alias to Python processes that a script below ``python -m ipex_quant.run`` starts.

`run` puts this file's directory on PYTHONPATH, and every Python that starts there imports a module of this name.
"""

import sys
from pathlib import Path

try:
    from ipex_quant.alias import install_as_ipex
except ModuleNotFoundError as error:
    if error.name != "ipex_quant":
        raise  # else it is another environment's Python, which has to start as well
else:
    install_as_ipex()

# The sitecustomize that this one hides, if there is one.
_here = str(Path(__file__).parent)
_path = sys.path[:]
sys.path[:] = [entry for entry in sys.path if entry != _here]
_own = sys.modules.pop("sitecustomize")
try:
    import sitecustomize  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "sitecustomize":
        raise
finally:
    sys.path[:] = _path
    sys.modules.setdefault("sitecustomize", _own)
