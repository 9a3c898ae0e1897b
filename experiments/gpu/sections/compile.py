"""Every launch of the kernels by the compiler, into its cache: no error, no spill, shared memory that fits."""

import time

from experiments.gpu.run import Run
from experiments.gpu.section import Section

TARGET = "sm_90"
REHEARSED = ["rope"]


def compile_all_launches(run: Run) -> None:
    from megapar.inspect.compile import SHARED_LIMIT, compile_all, specs_of

    start = time.monotonic()
    specs = specs_of(None if run.cuda else REHEARSED, [TARGET])
    found = compile_all(specs if run.cuda else specs[:2])
    seconds = time.monotonic() - start
    for one in found:
        fits = not one.error and not one.spill_bytes and one.shared_bytes <= one.shared_limit
        note = one.error or f"{one.registers} registers, {one.shared_bytes} B shared, {one.spill_bytes} B spilled"
        run.row(one.name, fits, one.spill_bytes, "B spilled", kind="static", note=note)
    note = f"{len(found)} launches in {seconds:.0f} s"
    wrong = sum(bool(one.error) for one in found)
    run.row("errors of the compiler", not wrong, wrong, f"of {len(found)}", kind="static", note=note)
    largest, limit = max((one.shared_bytes for one in found), default=0), SHARED_LIMIT[TARGET]
    run.row("largest shared memory", largest <= limit, largest, "B", kind="static", note=f"of {limit}")


SECTION = Section("compile", wave=1, seconds=80, run=compile_all_launches, interpret=False)
