"""The command line. A command is one file of `commands/`; alone in megapar, this room imports Hydra."""

from megapar.cli.main import main

__all__ = ["main"]
