"""Whole matrices: parts of every shape, of which some have copies, come together and go back to all their owners."""

import zlib
from collections.abc import Sequence
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megapar.config.layout import Layout
from megapar.config.model import Part
from megapar.launch.pool import WorkerPool
from megapar.mesh import Mesh
from megapar.optim import matrices
from megapar.optim.matrices import WholeMatrices, assigned, operands
from megapar.optim.optimizer import is_matrix
from megapar.parallel.buffers import StageBuffers
from megapar.parallel.context import StageContext
from megapar.parallel.record import Constant, ParameterRecord, Split

LAYER = Part("layers.0", "layer", ("hidden",), 0)
# (shape, splits) of weights that lie under each other in one parameter. 7 rows, 5 columns and 61 rows are divided
# unevenly by 2 and by 3 ranks, and what lies behind them begins at other places of a bucket on every rank; a matrix of
# one block has copies.
PARAMETERS: list[list[tuple[tuple[int, ...], tuple[Split, ...]]]] = [
    [((61, 3), (Split("tp", 0),)), ((4, 3), (Split("tp", 0, 1),)), ((6, 3), (Split("tp", 0),))],
    [((9, 5), (Split("tp", 1),))],
    [((7,), (Split("tp", 0),))],
    [((7, 6), (Split("tp", 0),))],
    [((3, 3), ())],
]


def declare(context: StageContext) -> None:
    context.part = LAYER
    for number, records in enumerate(PARAMETERS):
        named = [
            ParameterRecord(f"{number}.{one}", shape, Constant(0.0), splits)
            for one, (shape, splits) in enumerate(records)
        ]
        context.parameter(nn.Module(), "weight", *named)
    context.part = None
    context.parameter(nn.Module(), "table", ParameterRecord("table", (5, 4), Constant(0.0)))


def values_of(record: ParameterRecord) -> Tensor:
    """Another number for every element of every weight."""
    first = 1000.0 * (zlib.crc32(record.name.encode()) % 1000)
    return torch.arange(first, first + prod(record.shape), dtype=torch.float64).view(record.shape)


def square(rank: int, world_size: int, layout: Layout, zero: bool) -> tuple[dict[str, int], list[str], list[int], bool]:
    """Square every whole matrix. How often this rank did which, what stands in a wrong place, how many elements it sent
    each time, and whether a plan says so, too."""
    context = StageContext(Mesh(layout, rank), torch.float64)
    declare(context)
    buffers = StageBuffers(context, bucket_size=150, zero=zero)
    for held in buffers.held():
        held.view(buffers.grads).copy_(values_of(held.piece.record)[held.piece.shard.box])
    owned = [part.clone() for part in buffers.take_owned(buffers.grads)]
    whole, worked, sent = WholeMatrices(buffers, is_matrix), dict[str, int](), list[int]()
    records = {held.piece.record.name: held.piece.record for held in buffers.held()}
    names = {values_of(record).flatten()[0].item(): name for name, record in records.items()}
    original = matrices.all_to_all

    def counted(x: Tensor, given: Sequence[int], taken: Sequence[int], axis: Any) -> Tensor:
        sent.append(len(x))
        return original(x, given, taken, axis)

    def function(matrix: Tensor) -> Tensor:
        name = names[matrix[0, 0].item()]
        assert torch.equal(matrix, values_of(records[name])), name
        worked[name] = worked.get(name, 0) + 1
        return matrix.square()

    matrices.all_to_all = counted
    whole.each(owned, function)
    matrices.all_to_all = original
    wrong = []
    found = buffers.gather(owned)
    for held in buffers.held():
        expected = values_of(held.piece.record)
        expected = expected.square() if held.parameter.is_layer_matrix else expected
        if not torch.equal(held.view(found), expected[held.piece.shard.box]):
            wrong.append(held.piece.record.name)
    planned = operands(buffers, is_matrix)
    context.mesh.close()
    return worked, wrong, sent, tuple(sent) == planned


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("layout", ["single", "tp2", "tp3dp2", "tp2pp2dp2", "dp3"])
def test_a_matrix_is_worked_on_once_and_arrives_everywhere(layout: str, zero: bool, pool: WorkerPool) -> None:
    size = Layout.parse(layout)
    done = pool.run(square, size.world, size, zero)
    shapes = [shape for records in PARAMETERS for shape, _ in records if len(shape) == 2]
    assert [wrong for _, wrong, _, _ in done] == [[]] * size.world
    assert all(planned for *_, planned in done)
    counts = [count for worked, *_ in done for count in worked.values()]
    assert counts == [1] * len(shapes) * size["pp"]  # every stage has them here
    assert sum(sent[0] for _, _, sent, _ in done) == sum(map(prod, shapes)) * size["pp"]  # each element comes once


def test_work_is_shared() -> None:
    """Of 9 matrices of one size and a heavy one over 4 ranks nobody has more than the heavy one, or three."""
    shapes = {f"small {number}": (8, 8) for number in range(9)} | {"large": (8, 24)}
    found = assigned(shapes, 4)
    ranks = [sorted(name for name, rank in found.items() if rank == index) for index in range(4)]
    assert ["large"] in ranks and {len(names) for names in ranks} == {1, 3}
    assert assigned(dict(reversed(shapes.items())), 4) == found
