"""A frozen model beside the one that learns, in the same layout: what a loss compares it with."""

from collections.abc import Callable

from torch import Tensor

from megapar.checkpoint.load import fill_weights
from megapar.config.keys import changed
from megapar.config.schema import TrainConfig
from megapar.mesh import Mesh
from megapar.part import ModelPart
from megapar.pipeline.executor import Executor
from megapar.pipeline.stage import Batch, Tensors
from megapar.schedule.lower import forward_only, lower


class Reference:
    """Weights of `task.reference`, or initial values where that is None. Every method is collective."""

    def __init__(self, config: TrainConfig, mesh: Mesh) -> None:
        config = changed(config, {"parallel.zero": 0, "model.lora.rank": 0})
        path = config.task.reference
        self.part = ModelPart(config, mesh.rank, mesh=mesh, weights_only=True)
        if path is not None:
            fill_weights(path, self.part.buffers, self.part.buffers.params, config)
        self.executor = Executor(self.part.stages, mesh, self.part.context.weight_grads)

    def beside(self, batches: list[Batch], head: Callable[[Tensors, Batch], Tensor]) -> list[Batch]:
        """On the last stage with `reference`, what head(outputs, batch) gives of each; elsewhere as they are."""
        placement = self.part.schedule.placement
        schedule = lower(forward_only(placement, len(batches)), len(placement), len(batches))
        found = self.executor.run(schedule, batches, head)
        return [batch | {"reference": one} for batch, one in zip(batches, found, strict=True)] if found else batches
