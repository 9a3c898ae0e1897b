"""One file per command, each with its `COMMAND`. They are found by themselves, see `megapar/cli/command.py`."""
