"""The matrix product and its epilogue: both backends against fp64, and torch's own checks of the operators."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megapar.kernels import use_backend
from megapar.kernels.matmul import add_matmul, add_matmul_op, config_of, matmul, matmul_into_op, matmul_op
from megapar.launch.pool import WorkerPool
from tests.kernels.cases import DTYPES, distance, poisoned_memory
from tests.pairwise import pairwise

Case = dict[str, Any]
# one element; less than a tile, odd; a tile exactly; several tiles and steps, with more tiles than programs; rows that
# lie apart by a multiple of 16 bytes, which TMA needs, and not
CASES = pairwise(
    {
        "sizes": [(1, 1, 1), (3, 17, 5), (64, 128, 64), (257, 130, 200), (70, 300, 129)],
        "dtype": list(DTYPES),
        "a_transposed": [False, True],
        "b_transposed": [False, True],
        "slices": [False, True],
        "bias": [False, True],
        "activation": [None, "gelu", "relu", "silu"],
        "residual": [False, True],
    }
)
FUNCTIONS = {None: lambda x: x, "gelu": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu, "silu": F.silu}


def given(case: Case) -> dict[str, Tensor]:
    """Operands that the dtype holds, laid out as the case says."""
    M, K, N = case["sizes"]
    generator = torch.Generator().manual_seed(M * K + N)

    def draw(rows: int, columns: int, transposed: bool = False) -> Tensor:
        if transposed:
            return draw(columns, rows).t()
        wider = 3 if case["slices"] else 0
        return torch.randn(rows, columns + wider, generator=generator).to(DTYPES[case["dtype"]])[:, :columns]

    values = {"a": draw(M, K, case["a_transposed"]), "b": draw(K, N, case["b_transposed"]), "residual": draw(M, N)}
    return values | {"bias": draw(1, N)[0], "into": draw(M, N).float()}


def by_torch(case: Case, values: dict[str, Tensor]) -> list[Tensor]:
    product = values["a"] @ values["b"]
    y = FUNCTIONS[case["activation"]](product + values["bias"] if case["bias"] else product)
    y = y + values["residual"] if case["residual"] else y
    return [y, values["into"] + product.to(values["into"].dtype)]


def errors(rank: int, world_size: int, backend: str, cases: list[Case]) -> list[tuple[Case, str, float, float, float]]:
    """(case, output, error, torch's in the same dtype, largest value), against fp64; the ranks share the cases."""
    use_backend(backend)
    found = []
    for case in cases[rank::world_size]:
        values = given(case)
        with poisoned_memory():
            into = values["into"].clone()
            wide = torch.full((case["sizes"][0], case["sizes"][2] + 5), torch.nan, dtype=DTYPES[case["dtype"]])
            out = wide[:, : case["sizes"][2]] if case["slices"] else None
            y = matmul(
                values["a"], values["b"], activation=case["activation"], out=out,
                bias=values["bias"] if case["bias"] else None,
                residual=values["residual"] if case["residual"] else None,
            )  # fmt: skip
            add_matmul(into, values["a"], values["b"])
        assert y.dtype == DTYPES[case["dtype"]] and (y is out or (out is None and y.is_contiguous()))
        assert wide[:, case["sizes"][2] :].isnan().all()  # beside a slice nothing is written
        plain, exact = by_torch(case, values), by_torch(case, {name: x.double() for name, x in values.items()})
        for name, ours, b, c in zip(("y", "into"), (y, into), plain, exact, strict=True):
            found.append((case, name, distance(ours.double(), c), distance(b.double(), c), float(c.abs().max())))
    return found


@pytest.mark.parametrize("backend", ["torch", "interpret"])
def test_against_fp64(backend: str, interpreter: WorkerPool) -> None:
    """An error is at most twice torch's in the same dtype, or the rounding of a sum of 300 in fp32: 32 last bits."""
    found = [row for part in interpreter.run(errors, 2, backend, CASES) for row in part]
    assert len(found) == 2 * len(CASES)
    for case, output, error, plain, size in found:
        assert error <= 2 * plain + 32 * torch.finfo(torch.float32).eps * max(1.0, size), (case, output)


def check_operators(rank: int, world_size: int) -> None:
    use_backend("interpret")
    a, b, bias, residual = torch.randn(3, 5), torch.randn(5, 4), torch.randn(4), torch.randn(3, 4)
    torch.library.opcheck(matmul_op, (a, b, bias, "gelu", residual))
    torch.library.opcheck(add_matmul_op, (residual, a, b))
    torch.library.opcheck(matmul_into_op, (torch.empty(3, 4), a, b, bias, "gelu", residual))
    compiled = torch.compile(matmul, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(a, b, bias=bias), matmul(a, b, bias=bias))
    out = residual.clone()
    assert torch.equal(compiled(a, b, residual=out, out=out), matmul(a, b, residual=residual))
    columns = torch.zeros(4, 3).t()  # lie together
    add_matmul(columns, a, b)
    assert torch.equal(columns, matmul(a, b))
    with pytest.raises(RuntimeError, match="autograd"):  # gradients are the owner's: never silently none
        matmul(a.requires_grad_(), b).sum().backward()


def test_operators_pass_torchs_checks(interpreter: WorkerPool) -> None:
    interpreter.run(check_operators, 1, timeout=300)


def test_a_tile_for_every_processor() -> None:
    large, middle, small = (
        config_of("sm_90", torch.bfloat16, M, N, 132) for M, N in ((8192, 4096), (4096, 768), (9, 9))
    )
    assert [(c.rows, c.columns) for c in (large, middle, small)] == [(128, 256), (128, 128), (64, 128)]
    assert config_of("sm_86", torch.bfloat16, 8192, 8192, 84) == config_of("sm_80", torch.bfloat16, 8192, 8192, 84)


def test_an_output_apart_from_the_inputs() -> None:
    """Tiles are written while others are still to be read. A residual is read where it is written: it may be out."""
    memory = torch.randn(40, 4)
    square, below, overlapping = memory[:4], memory[4:8], memory[2:6]
    for a, b in ((square, below), (below, square.t())):
        for out in (square, overlapping):
            with pytest.raises(ValueError, match=r"out shares memory with [ab]"):
                matmul(a, b, out=out)
    with pytest.raises(ValueError, match="out shares memory with bias"):
        matmul(square, below, bias=memory[8], out=memory[8:12])
    with pytest.raises(ValueError, match="out shares memory with residual"):
        matmul(square, below, residual=memory[9:13], out=memory[8:12])
    with pytest.raises(ValueError, match="into shares memory with b"):
        add_matmul(below, square, below)
    expected = memory[8:12] + square @ below
    assert torch.equal(matmul(square, below, residual=memory[8:12], out=memory[8:12]), expected)
    wide = torch.randn(4, 8)  # beside each other, in the same rows
    expected = wide[:, :4] @ square
    assert torch.equal(matmul(wide[:, :4], square, out=wide[:, 4:]), expected)


def test_contradictions_are_refused() -> None:
    a, b = torch.zeros(2, 3), torch.zeros(3, 4)
    for bad in ((a, b.t()), (a, b.double()), (a[0], b), (a.int(), b.int())):
        with pytest.raises(ValueError, match=r"need \[M, K\] and \[K, N\] of one floating dtype"):
            matmul(*bad)
    with pytest.raises(ValueError, match="memory for every element"):
        matmul(torch.ones(7, 4), torch.ones(4, 3), out=torch.zeros(1, 3).expand(7, 3))
    with pytest.raises(ValueError, match="rows that lie together"):
        matmul(a, b, out=torch.zeros(4, 2).t())
    with pytest.raises(ValueError, match=r"need .* of one floating dtype"):
        add_matmul(torch.zeros(2, 4, dtype=torch.int32), a.int(), b.int())
    with pytest.raises(ValueError, match=r"out \[4, 2\].*need \[2, 4\]"):
        matmul(a, b, out=torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"bias \[3\].*need \[4\]"):
        matmul(a, b, bias=torch.zeros(3))
    with pytest.raises(ValueError, match=r"residual \[2, 3\].*need \[2, 4\]"):
        matmul(a, b, residual=a)
    with pytest.raises(ValueError, match="gelu, relu, silu"):
        matmul(a, b, activation="tanh")
    with pytest.raises(ValueError, match=r"into .*float16.* need \[2, 4\] in torch.float32"):
        add_matmul(torch.zeros(2, 4, dtype=torch.float16), a, b)
