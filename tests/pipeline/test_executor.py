"""The executor with stages of other kinds than a Transformer's: several tensors, changing shapes, whole numbers."""

import resource
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megapar.config.layout import Layout
from megapar.launch.machine import keep_freed_memory
from megapar.launch.pool import PoolError, WorkerPool
from megapar.mesh import Mesh
from megapar.parallel.weight_grad import WeightGrads
from megapar.pipeline.executor import Batch, Executor, Tensors, _Phase
from megapar.pipeline.stage import TensorSpec
from megapar.schedule.actions import COMPUTE, Action
from megapar.schedule.build import build, default_chunks, generators

MICROBATCHES = 4
LENGTHS = (3, 5, 2, 7)  # of the sequence, by micro-batch
SOURCES = (4, 1, 6, 2)  # of the encoder's


class CrossStage(nn.Module):
    """A decoder's stage that reads an encoder's output and hands it on.

    hidden [length, 3] changes with every stage, memory [source, 3] goes along untouched, mask [source] holds whole
    numbers and has no gradient, scale [] is a scalar. Stage 1 of 4 makes the hidden state one column wider.
    """

    def __init__(self, stage: int, stages: int) -> None:
        super().__init__()
        self.first, self.width = stage == 0, 3 + (stage >= 1)
        self.given = 3 + (stage >= 2)
        generator = torch.Generator().manual_seed(stage)
        self.weight = nn.Parameter(torch.randn(self.given, self.width, generator=generator, dtype=torch.float64))
        self.read = nn.Parameter(torch.randn(3, self.width, generator=generator, dtype=torch.float64))

    def received(self, batch: Batch) -> dict[str, TensorSpec]:
        return self._specs(batch, self.given)

    def sent(self, batch: Batch) -> dict[str, TensorSpec]:
        return self._specs(batch, self.width)

    def _specs(self, batch: Batch, width: int) -> dict[str, TensorSpec]:
        length, source = batch["x"].shape[0], batch["memory"].shape[0]
        return {  # in no particular order: names decide
            "mask": TensorSpec((source,), torch.int64),
            "hidden": TensorSpec((length, width), torch.float64),
            "scale": TensorSpec((), torch.float64),
            "memory": TensorSpec((source, 3), torch.float64),
        }

    def forward(self, received: Tensors, batch: Batch) -> Tensors:
        if self.first:
            scale = self.weight.sum().tanh()
            given = {"hidden": batch["x"], "memory": batch["memory"] * self.read.mean(), "scale": scale}
            received = given | {"mask": (torch.arange(batch["memory"].shape[0]) % 2)}
        memory, mask = received["memory"], received["mask"]
        seen = (memory * mask.unsqueeze(1)).sum(0, keepdim=True) @ self.read
        hidden = torch.tanh(received["hidden"] @ self.weight + seen) * received["scale"]
        return {"scale": received["scale"], "hidden": hidden, "memory": memory, "mask": mask}


def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    shapes = zip(LENGTHS, SOURCES, strict=True)
    return [
        {
            "x": torch.randn(length, 3, generator=generator, dtype=torch.float64),
            "memory": torch.randn(source, 3, generator=generator, dtype=torch.float64),
        }
        for length, source in shapes
    ]


def loss_of(outputs: Tensors, batch: Batch) -> Tensor:
    return outputs["hidden"].square().sum() + outputs["memory"].sum()


def run_cross(rank: int, world_size: int, name: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    schedule = build(name, world_size, MICROBATCHES)
    mesh = Mesh(Layout(pp=world_size), rank)
    stages = {stage: CrossStage(stage, schedule.stages) for stage in schedule.stages_of(rank)}
    losses = Executor(stages, mesh, WeightGrads(), loss_of).run(schedule, batches())
    mesh.close()
    grads = {f"{stage}.{key}": p.grad for stage, module in stages.items() for key, p in module.named_parameters()}
    assert all(grad is not None for grad in grads.values())
    return losses, grads  # type: ignore[return-value]


def reference(stages: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The same stages one after another, without an executor."""
    modules = [CrossStage(stage, stages) for stage in range(stages)]
    losses = []
    for batch in batches():
        passed: Tensors = {}
        for module in modules:
            passed = module(passed, batch)
        loss = loss_of(passed, batch)
        loss.backward()
        losses.append(loss.detach())
    grads = {f"{stage}.{key}": p.grad for stage, module in enumerate(modules) for key, p in module.named_parameters()}
    return losses, grads  # type: ignore[return-value]


@pytest.mark.parametrize("name", sorted(generators()))
def test_dicts_of_changing_shape_pass_with_their_gradients(name: str, pool: WorkerPool) -> None:
    """Sums of a few fp64 terms, in another order where a stage's gradient meets its neighbour's: 1e-12 is plenty."""
    expected_losses, expected = reference(2 * default_chunks(name))
    (_, first), (_, last) = results = pool.run(run_cross, 2, name)
    losses = next(losses for losses, _ in results if losses)
    assert [float(loss) for loss in losses] == pytest.approx([float(loss) for loss in expected_losses], rel=1e-12)
    found = first | last
    assert found.keys() == expected.keys()
    for key, grad in found.items():
        torch.testing.assert_close(grad, expected[key], rtol=1e-12, atol=1e-12, msg=key)


class Forgetful(CrossStage):
    """Says that it sends a mask, and doesn't."""

    def forward(self, received: Tensors, batch: Batch) -> Tensors:
        outputs = super().forward(received, batch)
        del outputs["mask"]
        return outputs


def run_forgetful(rank: int, world_size: int) -> None:
    mesh = Mesh(Layout(pp=2), rank)
    Executor({rank: Forgetful(rank, 2)}, mesh, WeightGrads(), loss_of).run(build("1f1b", 2, MICROBATCHES), batches())


def test_a_stage_that_does_not_send_what_it_says(pool: WorkerPool) -> None:
    with pytest.raises(PoolError, match=r"0F0 gave .*`sent` says .*mask"):
        pool.run(run_forgetful, 2)


WIDE = 34 << 18  # fp32 elements: 34 MiB, which glibc would give back to the system with every free


class Wide(nn.Module):
    """Passes a large tensor on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def received(self, batch: Batch) -> dict[str, TensorSpec]:
        return {"x": TensorSpec((WIDE,), torch.float32)}

    sent = received

    def forward(self, received: Tensors, batch: Batch) -> Tensors:
        return {"x": received.get("x", batch["x"]) * self.weight}


def page_faults(rank: int, world_size: int) -> int:
    """Of the last three of twelve steps: it takes a few until every block is there that a step needs at once."""
    keep_freed_memory()
    mesh = Mesh(Layout(pp=2), rank)
    executor = Executor({rank: Wide()}, mesh, WeightGrads(), lambda outputs, batch: outputs["x"].sum())
    schedule, inputs = build("1f1b", 2, 2), [{"x": torch.ones(WIDE)}] * 2
    before = 0
    for step in range(12):
        if step == 9:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        executor.run(schedule, inputs)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    mesh.close()
    return faults


def test_message_buffers_are_reused(pool: WorkerPool) -> None:
    """The allocator keeps them: three steps touch few fresh pages, where each of their 12 messages has 8,704.

    A step without reuse has 52,000 faults on the first rank and 70,000 on the second. With it there are 5,000 to 17,000
    in the first dozen steps, and none after some thirty, once there is a block for everything that a step holds at
    once (measured). The bound is half of three steps' without.
    """
    assert max(pool.run(page_faults, 2)) < 78_000


def test_frozen_first_stage_trains_the_rest(pool: WorkerPool) -> None:
    [_, grads] = pool.run(run_frozen, 2)
    assert all(grad is not None for grad in grads.values())


def run_frozen(rank: int, world_size: int) -> dict[str, Any]:
    mesh = Mesh(Layout(pp=2), rank)
    stage = CrossStage(rank, 2).requires_grad_(rank == 1)
    Executor({rank: stage}, mesh, WeightGrads(), loss_of).run(build("1f1b", 2, MICROBATCHES), batches())
    mesh.close()
    return {name: p.grad for name, p in stage.named_parameters()}


def posted_ahead(rank: int, world_size: int, name: str) -> list[tuple[Action, int]]:
    """For every receive of this rank's row: how many computations began between its posting and its wait."""
    schedule = build(name, world_size, MICROBATCHES)
    mesh = Mesh(Layout(pp=world_size), rank)
    stages = {stage: CrossStage(stage, schedule.stages) for stage in schedule.stages_of(rank)}
    executor = Executor(stages, mesh, WeightGrads(), loss_of)
    begun, posted, found = 0, {}, []
    span, post = mesh.timeline.span, _Phase._post_receive

    def watched_post(phase: _Phase, channel: tuple[int, str]) -> None:
        before = set(phase._posted)
        post(phase, channel)
        posted.update(dict.fromkeys(set(phase._posted) - before, begun))

    def watched_span(kind: str, text: str, where: str = "", **options: bool) -> Any:
        nonlocal begun
        if kind in COMPUTE:
            begun += 1
        if kind.startswith("RECV"):
            action = Action.parse(text)
            found.append((action, begun - posted[action] if action in posted else -1))
        return span(kind, text, where, **options)

    _Phase._post_receive = watched_post  # type: ignore[method-assign, assignment]
    mesh.timeline.span = watched_span  # type: ignore[method-assign, assignment]
    try:
        executor.run(schedule, batches())
    finally:
        _Phase._post_receive = post  # type: ignore[method-assign]
    mesh.close()
    return found


@pytest.mark.parametrize("name", sorted(generators()))
def test_receives_are_posted_ahead(name: str, pool: WorkerPool) -> None:
    """Every receive is on its way before the computation ahead of it begins, but where there is none before it."""
    schedule = build(name, 2, MICROBATCHES)
    for rank, found in enumerate(pool.run(posted_ahead, 2, name)):
        row = schedule.rows[rank]
        assert len(found) == sum(action.kind.startswith("RECV") for action in row) > 0
        first = next(index for index, action in enumerate(row) if action.kind in COMPUTE)
        late = [str(action) for action, ahead in found if ahead < 1 and row.index(action) > first]
        assert late == []
