"""A rank's part of a configured model: its mesh, its stages, and the buckets of their parameters.

What trains, generates, verifies or plans begins with a `ModelPart`.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from megapar.checkpoint import Manifest
from megapar.checkpoint.load import load_base, load_parameters
from megapar.config.errors import UserError
from megapar.config.found import find_function
from megapar.config.schema import KernelsConfig, TrainConfig
from megapar.config.stages import make_schedule, ties
from megapar.kernels import interprets, use_backend, use_tile_scheduler
from megapar.kernels._common import check_overflow
from megapar.kernels._counters import reserve_counters
from megapar.mesh import Mesh
from megapar.models.stage import build_stage as build_transformer
from megapar.parallel.buffers import StageBuffers
from megapar.parallel.context import StageContext
from megapar.parallel.plain import adopt
from megapar.parallel.weight_grad import WeightGrads
from megapar.pipeline.stage import Stage

BuildStage = Callable[[TrainConfig, StageContext], Stage]
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


def find_builder(module: str | None) -> BuildStage:
    """What `model.module` names, `package:function`: it builds a stage from (config, context). None: the Transformer.

    Raises ConfigError, see `find_function`.
    """
    if module is None:
        return build_transformer
    return find_function("model.module", module, "my_model:build_stage", "a function that builds a stage")


def make_mesh(config: TrainConfig, rank: int) -> Mesh:
    device = torch.device("cuda", torch.cuda.current_device()) if config.train.device == "cuda" else torch.device("cpu")
    return Mesh(config.parallel.layout, rank, device, config.train.timeout)


def _choose_kernels(kernels: KernelsConfig, device: torch.device) -> None:
    try:
        use_backend(kernels.backend)
        use_tile_scheduler(kernels.tile_scheduler)
    except ValueError as error:
        raise UserError(str(error)) from None
    if interprets():
        check_overflow(False)
    if kernels.tile_scheduler == "dynamic":
        reserve_counters(device)


class ModelPart:
    """A rank's part of the model: its stages by number and the flat buffers of their parameters.

    build_stage: makes a stage from (config, context); the default is what `model.module` names, or the Transformer.
    mesh: reuse an existing mesh of the same layout; torch cannot recreate destroyed groups.
    weights_only: for weights that are not trained, see `StageBuffers`.
    initial: with initial values; else zeros, of what is filled at once.
    weight_grads: what adds weight gradients, if not the plain one of training.
    thawed: what LoRA freezes is trained, too.

    buffers: of the parameters that are trained, or with weights_only of all; frozen: of the others, if there are any
    """

    def __init__(
        self,
        config: TrainConfig,
        rank: int,
        build_stage: BuildStage | None = None,
        *,
        mesh: Mesh | None = None,
        weights_only: bool = False,
        initial: bool = True,
        weight_grads: WeightGrads | None = None,
        thawed: bool = False,
    ) -> None:
        train, parallel = config.train, config.parallel
        assert parallel.bucket_size is not None
        self.config = config
        self.mesh = mesh or make_mesh(config, rank)
        if self.mesh.groups:  # a plan runs no kernel
            _choose_kernels(config.kernels, self.mesh.device)
        self.schedule = make_schedule(config)
        self.context = StageContext(
            self.mesh,
            DTYPES[train.dtype],
            sequence_parallel=parallel.sequence_parallel,
            tp_overlap=parallel.tp_overlap,
            seed=train.seed,
            placement=self.schedule.placement,
            weight_grads=weight_grads or WeightGrads(),
            frozen=config.model.lora.rank > 0 and not (thawed or weights_only),
        )
        for name, (stages, part) in ties(config).items():
            self.context.tie(name, stages, part)
        build_stage = build_stage or find_builder(config.model.module)
        self.stages: dict[int, Stage] = {}
        for number in self.schedule.stages_of(self.mesh["pp"].index):
            self.context.stage = number
            with self.context.seeded(f"stage {number}"):
                self.stages[number] = build_stage(config, self.context)
            adopt(self.stages[number], self.context)
        size, zero = parallel.bucket_size, parallel.zero == 1
        make = partial(StageBuffers, self.context, bucket_size=size, initial=initial)
        self.buffers = make(zero=zero, weights_only=weights_only, chosen=lambda parameter: not parameter.frozen)
        self.frozen: StageBuffers | None = None
        if self.context.frozen:
            self.frozen = make(zero=False, weights_only=True, chosen=lambda parameter: parameter.frozen)
            if self.mesh.groups:
                load_base(self.frozen, config)

    def close(self) -> None:
        """Give back what peers share, and destroy the mesh's groups."""
        self.context.overlaps.close()
        self.mesh.close()


def open_part(config: TrainConfig, path: str | Path, rank: int) -> tuple[ModelPart, Manifest]:
    """A rank's part with the weights of a checkpoint, for forwards alone, and that checkpoint's manifest. Collective.

    path: a step folder, a folder of checkpoints or a run directory (the newest there). Raises UserError on all ranks.
    """
    lora = config.model.lora
    # Adapters without a base stand beside the initial values, which no checkpoint holds.
    part = ModelPart(config, rank, weights_only=True, initial=lora.rank > 0 and lora.base is None)
    return part, load_parameters(path, part.buffers, config)
