"""Tests. They see no GPU, whatever the machine has: what picks one by itself would run elsewhere than was meant.

MEGAPAR_TEST_GPU=1 leaves the GPUs visible, for tests that ask for one.
"""

import os

if os.environ.get("MEGAPAR_TEST_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anything imports torch
