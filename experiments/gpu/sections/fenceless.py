"""How many epochs go wrong without the fence before TMA reads what ordinary stores wrote. Any number is right."""

from unittest import mock

import torch

from experiments.gpu.run import Run
from experiments.gpu.section import Section
from experiments.gpu.sections.symmetric import ENVIRONMENT, Ranks
from megapar.kernels import use_backend
from megapar.kernels._common import check_overflow
from megapar.kernels.comm import matmul as fused
from megapar.kernels.comm import symmetric as protocol


def fenceless(run: Run) -> None:
    use_backend(run.backend)
    if not run.cuda:
        check_overflow(False)
    form = "all_gather_matmul" if run.cuda else "matmul_reduce_scatter"  # interpreted, gathering ranks would wait
    with mock.patch.object(fused, "fence_tma", protocol.nap):
        run.attempt(form, Ranks(run, 2, [form], " without its fence").run_all, (torch.bfloat16,))


SECTION = Section("fenceless", wave=6, seconds=30, run=fenceless, environment=ENVIRONMENT)
