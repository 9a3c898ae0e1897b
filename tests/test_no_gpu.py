"""Tests take no GPU by accident."""

import os
import subprocess
import sys

import pytest

SEEN = "import tests, os, sys; print(os.environ['CUDA_VISIBLE_DEVICES'], 'torch' in sys.modules)"


@pytest.mark.parametrize(("asked", "seen"), [("", "False"), ("0", "False"), ("1", "3 False")])
def test_tests_see_gpus_only_if_asked(asked: str, seen: str) -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "3", "MEGAPAR_TEST_GPU": asked}
    done = subprocess.run([sys.executable, "-c", SEEN], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == seen


def test_this_process_sees_none() -> None:
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" or os.environ["MEGAPAR_TEST_GPU"] == "1"
