"""``optimum-cli export rk-onnx``: the command ``rk-export compress`` under Optimum's command line.

The build installs this file as ``optimum/commands/register/rk_onnx.py``, a namespace folder that Optimum
reads at every start of ``optimum-cli``: only the parser is built here, heavy imports wait until it runs.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from pathlib import Path

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

from rk_export.cli.handlers import run_compress
from rk_export.cli.main import run_command
from rk_export.cli.parser import add_compress_options, add_output_arguments


class RkOnnxExportCommand(BaseOptimumCLICommand):  # type: ignore[misc]
    """Compress a model and export it to ONNX Runtime."""

    COMMAND = CommandInfo(
        name="rk-onnx", help="Compress a model and export it to ONNX Runtime with rk-export."
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Name model and output as Optimum's other exports do; the options are those of ``rk-export``."""
        parser.add_argument("-m", "--model", required=True, help="HF folder, hub id or .gguf file")
        parser.add_argument("output", type=Path, help="bundle folder")
        add_compress_options(parser)
        add_output_arguments(parser)

    def run(self) -> None:
        """Run the command and end with the exit status of ``rk-export``."""
        sys.exit(run_command(run_compress, self.args, ["optimum-cli", *sys.argv[1:]]))


REGISTER_COMMANDS = [(RkOnnxExportCommand, ExportCommand)]
