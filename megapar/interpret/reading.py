"""A rank's part of a model reads token ids in one pass, in whatever layout."""

import torch
from torch import Tensor

from megapar.part import ModelPart
from megapar.pipeline.executor import Executor
from megapar.schedule.lower import forward_only, lower


def read(part: ModelPart, ids: Tensor) -> None:
    """ids int64 [B, S], the same on every rank: samples 0 to B - 1, for what captures and patches do on the way.

    Collective, without gradients or dropout. Every dp rank reads all samples.
    """
    batch = {
        "ids": ids.to(part.mesh.device),
        "samples": torch.arange(len(ids), device=part.mesh.device),
        "step": torch.tensor(0),
    }
    placement = part.context.placement
    schedule = lower(forward_only(placement, 1), len(placement), 1)
    with part.context.whole_tokens():
        executor = Executor(part.stages, part.mesh, part.context.weight_grads)
        executor.run(schedule, [batch], lambda outputs, batch: torch.zeros(()))
    part.mesh.timeline.forget()
