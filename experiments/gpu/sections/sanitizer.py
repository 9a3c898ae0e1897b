"""compute-sanitizer's memcheck over one small launch of each kernel, where it is installed."""

import os
import re
import shutil
import subprocess
import sys

from experiments.gpu import launches
from experiments.gpu.run import Run
from experiments.gpu.section import Section

ELSEWHERE = "/usr/local/cuda/bin/compute-sanitizer"
CLEAN = "========= ERROR SUMMARY: 0 errors\n"  # what it says of a program without any
RESERVE_S = 15.0  # for the program without it, which says whether a failure is the tool's


def sanitizer(run: Run) -> None:
    code = f"from {launches.__name__} import launches; launches({run.device!r})"
    program = [sys.executable, "-c", code]
    tool = shutil.which("compute-sanitizer") or (ELSEWHERE if os.path.exists(ELSEWHERE) else None)
    if run.cuda and tool is not None:
        checked(run, [tool, "--tool", "memcheck", *program])  # card-only
    else:
        run.skip("memcheck", "compute-sanitizer is not installed" if run.cuda else "it needs a GPU")
    text = said(run, program)
    run.row("one launch of each kernel", launches.DONE in text, note="" if launches.DONE in text else text[-200:])
    run.row("memcheck's count can be read", errors_of(CLEAN) == 0 and errors_of(text) is None)


def said(run: Run, command: list[str]) -> str:
    """All that a program prints."""
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    limit = max(5.0, run.left() - RESERVE_S)
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=limit)
    except subprocess.TimeoutExpired:  # card-only
        return f"it took more than {limit:.0f} s"
    return done.stdout + done.stderr


def errors_of(text: str) -> int | None:
    """How many errors memcheck counts in what it printed; None: it did not come to count."""
    found = re.search(r"ERROR SUMMARY: (\d+) error", text)
    return None if found is None or "not supported" in text else int(found[1])


def checked(run: Run, command: list[str]) -> None:  # card-only
    text = said(run, command)
    errors = errors_of(text)
    (run.out / "sanitizer.txt").write_text(text[-200_000:])
    if errors is None:
        run.skip("memcheck", text.strip().splitlines()[-1][:200] if text.strip() else "it said nothing")
    else:
        run.row("memcheck", errors == 0 and launches.DONE in text, errors, "errors", note="see sanitizer.txt")


SECTION = Section("sanitizer", wave=6, seconds=60, run=sanitizer)
