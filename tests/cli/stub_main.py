"""The command line with a stub of `stubs.py` in place of training: python stub_main.py STUB COMMAND [overrides]."""

import sys

from megapar.cli import main
from megapar.launch import external

if __name__ == "__main__":
    # All ranks end together as soon as all have read a refusal. On a busy machine they start seconds apart.
    external.REFUSAL_S = 60.0
    sys.exit(main(sys.argv[2:], entry=f"stubs:{sys.argv[1]}"))
