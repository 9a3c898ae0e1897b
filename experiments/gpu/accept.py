#!/usr/bin/env python3
"""Acceptance of megapar on one GPU: is every number right, and how fast is it beside what the card can do?

    python experiments/gpu/accept.py --out DIR [--seconds N] [--only SECTION,...] [--device cpu] [--seed N]

Without a GPU it rehearses: the same code, tiny, with Triton's interpreter. README.md says how to read what it writes.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # and not this folder, whose names nobody should find

from experiments.gpu.command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
