"""``python -m intel_extension_for_pytorch.cpu.launch``: the command `ipexrun`."""

import sys

from ipex_quant.cpu.launch import main  # this file runs as a module of IPEX's package

if __name__ == "__main__":
    sys.exit(main())
