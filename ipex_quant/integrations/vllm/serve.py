"""``python -m ipex_quant.integrations.vllm.serve MODEL ...``: vLLM's `vllm serve`, with its options.

The command `vllm` of the CPU build does not start (0.32 asks for the version of a package of another name).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.utils.argparse_utils import FlexibleArgumentParser


def main(arguments: Sequence[str]) -> None:
    """Serve a model until the process is told to end; with ``--headless`` as a node that other nodes talk to."""
    cli_env_setup()
    parser = FlexibleArgumentParser(prog="python -m ipex_quant.integrations.vllm.serve")
    command = ServeSubcommand()
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    options = parser.parse_args(["serve", *arguments])
    command.validate(options)
    command.cmd(options)


if __name__ == "__main__":
    main(sys.argv[1:])
