"""The command line with a stub of `stubs.py` in place of training: python stub_main.py STUB COMMAND [overrides]."""

import sys

from megapar.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[2:], entry=f"stubs:{sys.argv[1]}"))
