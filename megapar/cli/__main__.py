"""`python -m megapar.cli`, and `torchrun -m megapar.cli`."""

import sys

from megapar.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
