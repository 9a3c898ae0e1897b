"""What one rank of a layout would hold and do: parameters, bytes by kind, parts, schedule row, messages, groups."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from megapar.config.layout import RANK_ORDER
from megapar.config.model import Part
from megapar.config.schema import TrainConfig
from megapar.config.stages import stage_parts
from megapar.mesh import Mesh
from megapar.optim.optimizer import state_elements
from megapar.parallel.buffers import Held
from megapar.part import ModelPart
from megapar.plan.messages import Messages, messages


@dataclass(frozen=True)
class RankPlan:
    """coordinates: index along every axis. parameters: elements that the rank holds, copies too.

    bytes: by kind, with padding: weights; gradients (main gradients, and with ZeRO-1 the owned part once more);
        optimizer (its state, and master weights where they are copies); activations (an estimate: the most that the
        schedule has in flight)
    parts: names by stage; row: the rank's actions of a step; messages: of a step, by axis
    groups: ranks that it communicates with, by axis
    """

    rank: int
    coordinates: dict[str, int]
    parameters: int
    bytes: dict[str, int]
    parts: dict[int, list[str]]
    row: list[str]
    messages: dict[str, Messages]
    groups: dict[str, list[int]]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def plan_rank(config: TrainConfig, rank: int) -> RankPlan:
    """The plan of a rank of a resolved and checked config. No process group, no memory, no data."""
    mesh = Mesh(config.parallel.layout, rank, torch.device("meta"), groups=False)
    part = ModelPart(config, rank, mesh=mesh)
    stages = stage_parts(config)
    mine = part.schedule.stages_of(mesh["pp"].index)
    row = part.schedule.rows[mesh["pp"].index]
    axes = [*(mesh[name] for name in RANK_ORDER), mesh["world"]]
    return RankPlan(
        rank=rank,
        coordinates=dict(mesh.place),
        parameters=sum(held.run.stop - held.run.start for held in _all_held(part)),
        bytes=state(part) | {"activations": round(_peak(row, stages))},
        parts={stage: [one.name for one in stages[stage]] for stage in mine},
        row=[str(action) for action in row],
        messages=messages(config, part),
        groups={axis.name: list(axis.ranks) for axis in axes if axis.size > 1},
    )


def _all_held(part: ModelPart) -> Iterator[Held]:
    yield from part.buffers.held()
    if part.frozen is not None:
        yield from part.frozen.held()


def state(part: ModelPart) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer state of a rank's buckets."""
    buffers, context = part.buffers, part.context
    narrow, wide = context.dtype.itemsize, context.wide_dtype.itemsize
    size = sum(bucket.size for bucket in buffers.buckets)
    owned = sum(bucket.owned.stop - bucket.owned.start for bucket in buffers.buckets)
    masters = owned if buffers.zero or narrow < wide else 0
    frozen = sum(bucket.size for bucket in part.frozen.buckets) if part.frozen is not None else 0
    return {
        "weights": (size + frozen) * narrow,
        "gradients": (size + (owned if buffers.zero else 0)) * wide,
        "optimizer": (masters + state_elements(buffers, part.config.optim)) * wide,
    }


def _peak(row: Any, stages: list[list[Part]]) -> float:
    """The most bytes of activations at once: a micro-batch's stay from its F to the end of its backward."""
    held = most = 0.0
    for action in row:
        bytes_of_stage = sum(part.activation for part in stages[action.stage])
        if action.kind == "F":
            held += bytes_of_stage
            most = max(most, held)
        elif action.kind in ("B", "W"):
            held -= bytes_of_stage
    return most


def shortened(row: list[str], width: int = 100) -> str:
    """A row of actions in one line of about this width, without the middle of what is too long."""
    if len(" ".join(row)) <= width:
        return " ".join(row)
    keep = 1
    while len(" ".join([*row[: keep + 1], *row[-keep - 1 :]])) <= width - 20:
        keep += 1
    return " ".join([*row[:keep], f"... {len(row) - 2 * keep} more ...", *row[-keep:]])
