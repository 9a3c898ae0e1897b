"""The runs of `training` on a CPU in fp64, beside what else needs no GPU."""

import math
import os

import torch

from experiments.gpu.models import configuration, recipes
from experiments.gpu.run import Run
from experiments.gpu.section import Section
from experiments.gpu.sections.training import trained

THREADS = 4


def reference(run: Run) -> None:
    chosen = recipes(run.cuda)
    run.device, run.cuda = "cpu", False
    torch.set_num_threads(min(THREADS, os.cpu_count() or 1))
    found = {}
    for name, (values, steps) in chosen.items():
        done = trained(configuration(run, values | {"train.dtype": "fp64", "kernels.backend": "torch"}), steps)
        found[name] = {"losses": done.losses, "norms": done.norms, "weights": done.weights}
        note = f"loss {done.losses[0]:.4f} -> {done.losses[-1]:.4f}"
        run.row(f"{name} in fp64 on a CPU", all(map(math.isfinite, done.losses)), kind="static", note=note)
    beside = run.out / "work" / "reference.tmp"
    torch.save(found, beside)
    beside.rename(beside.with_suffix(".pt"))


SECTION = Section("reference", wave=1, seconds=75, run=reference)
