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


def sanitizer(run: Run) -> None:
    code = f"from {launches.__name__} import launches; launches({run.device!r})"
    program = [sys.executable, "-c", code]
    tool = shutil.which("compute-sanitizer") or (ELSEWHERE if os.path.exists(ELSEWHERE) else None)
    checked = run.cuda and tool is not None
    if not checked:
        run.skip("memcheck", "compute-sanitizer is not installed" if run.cuda else "it needs a GPU")
    command = [str(tool), "--tool", "memcheck", *program] if checked else program
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=max(5, run.left()))
    text = done.stdout + done.stderr
    run.row("one launch of each kernel", launches.DONE in text, note="" if launches.DONE in text else text[-200:])
    run.row("memcheck's count can be read", errors_of(text + CLEAN) == 0)
    if checked:
        (run.out / "sanitizer.txt").write_text(text[-200_000:])  # card-only
        row(run, errors_of(text), text)  # card-only


def errors_of(text: str) -> int | None:
    """How many errors memcheck counts in what it printed; None: it did not come to count."""
    found = re.search(r"ERROR SUMMARY: (\d+) error", text)
    return None if found is None or "not supported" in text else int(found[1])


def row(run: Run, errors: int | None, text: str) -> None:
    if errors is None:  # card-only
        run.skip("memcheck", text.strip().splitlines()[-1][:200] if text.strip() else "it said nothing")
    else:  # card-only
        run.row("memcheck", errors == 0, errors, "errors")


SECTION = Section("sanitizer", wave=6, seconds=60, run=sanitizer)
