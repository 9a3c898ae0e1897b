"""SwiGLU, GEGLU and GELU: the interpreted kernels against torch in fp64, and torch's own checks of the operators."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megapar.kernels import use_backend
from megapar.kernels.swiglu import (
    fused_backward_op,
    fused_op,
    gated_backward_op,
    gated_op,
    geglu,
    gelu,
    gelu_backward_op,
    gelu_erf,
    gelu_op,
    swiglu,
)
from megapar.launch.pool import WorkerPool
from tests.kernels.cases import DTYPES, distance, poisoned_memory

# name -> (ours, torch's, tensors that it takes)
FUNCTIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], int]] = {
    "swiglu": (swiglu, lambda gate, up: F.silu(gate) * up, 2),
    "geglu": (geglu, lambda gate, up: F.gelu(gate, approximate="tanh") * up, 2),
    "gelu": (gelu, lambda x: F.gelu(x, approximate="tanh"), 1),
    "gelu_erf": (gelu_erf, F.gelu, 1),
}


def errors(rank: int, world_size: int, name: str, dtype: str, rows: int, columns: int) -> list[tuple[float, ...]]:
    """(error, torch's in the same dtype, largest value) of value and gradients, in fp64; the inputs are slices."""
    function, plain, count = FUNCTIONS[name]
    generator = torch.Generator().manual_seed(rows + columns)
    # Three times as wide as a normal distribution: both functions have left their bend well behind at the ends.
    fused = (3 * torch.randn(rows, count * columns + 1, generator=generator)).to(DTYPES[dtype])
    dout = torch.randn(rows, columns, generator=generator).to(DTYPES[dtype])
    use_backend("interpret")
    results = []
    with poisoned_memory():
        for call, given in ((plain, fused.double()), (plain, fused), (function, fused)):
            inputs = given.detach().requires_grad_()[:, 1:].split(columns, 1)
            out = call(*inputs)
            results.append([out, *torch.autograd.grad(out, inputs, dout.to(out.dtype))])
    exact, torchs, found = ([x.detach().double() for x in result] for result in results)
    return [
        (distance(a, c), distance(b, c), float(c.abs().max())) for a, b, c in zip(found, torchs, exact, strict=True)
    ]


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 17), (65, 64), (7, 2051)])
def test_interpreted(interpreter: WorkerPool, name: str, dtype: str, rows: int, columns: int) -> None:
    """No error is more than twice torch's in the same dtype, or a few of fp32's last bits of the largest value."""
    for error, plain, size in interpreter.run(errors, 1, name, dtype, rows, columns)[0]:
        assert error <= 2 * plain + 4 * torch.finfo(torch.float32).eps * max(1.0, size)


def gate_beside_up(rank: int, world_size: int, backend: str, name: str) -> list[bool]:
    """Whether value and gradient of the fused matrix are those of its halves, to the bit, also of a matrix laid out by
    columns; and whether the gradient came in one piece."""
    use_backend(backend)
    function, same = FUNCTIONS[name][0], []
    for (rows, columns), dtype, turned in product([(1, 1), (3, 17), (65, 64)], DTYPES.values(), (False, True)):
        generator = torch.Generator().manual_seed(rows)
        x = torch.randn(2 * columns, rows, generator=generator).t() if turned else torch.randn(rows, 2 * columns)
        x = x.to(dtype).requires_grad_()
        dout = torch.randn(rows, columns, generator=generator).to(dtype)
        with poisoned_memory():
            results = [(y, *torch.autograd.grad(y, x, dout)) for y in (function(x), function(*x.split(columns, 1)))]
        same += [torch.equal(a, b) for a, b in zip(*results, strict=True)]
    return same


@pytest.mark.parametrize("backend", ["torch", "interpret"])
@pytest.mark.parametrize("name", ["swiglu", "geglu"])
def test_gate_beside_up(interpreter: WorkerPool, backend: str, name: str) -> None:
    found = interpreter.run(gate_beside_up, 1, backend, name)[0]
    assert len(found) == 36 and all(found)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_in_torch(name: str) -> None:
    """Without Triton they are torch's own, to the bit."""
    function, plain, count = FUNCTIONS[name]
    inputs = torch.randn(5, 4 * count, dtype=torch.float64, requires_grad=True).split(4, 1)
    assert torch.equal(function(*inputs), plain(*inputs))


def far_out(rank: int, world_size: int, name: str) -> list[Tensor]:
    use_backend("interpret")
    x = torch.tensor([[-1e4, -100.0, -50.0, 50.0, 100.0, 1e4]]).requires_grad_()
    inputs = [x, torch.ones_like(x)][: FUNCTIONS[name][2]]
    out = FUNCTIONS[name][0](*inputs)
    return [out.detach(), *torch.autograd.grad(out.sum(), x)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_far_from_zero(interpreter: WorkerPool, name: str) -> None:
    """Where the exponential overflows or vanishes: x or 0, slope 1 or 0."""
    value, slope = interpreter.run(far_out, 1, name)[0]
    torch.testing.assert_close(value, torch.tensor([[0.0, 0.0, 0.0, 50.0, 100.0, 1e4]]), rtol=0, atol=1e-18)
    torch.testing.assert_close(slope, torch.tensor([[0.0, 0.0, 0.0, 1.0, 1.0, 1.0]]), rtol=0, atol=1e-18)


def check_operators(rank: int, world_size: int) -> None:
    """torch's own checks of the operators, and of torch.compile."""
    use_backend("interpret")
    gate, up, dout = (torch.randn(3, 5) for _ in range(3))
    for function in ("silu", "gelu"):
        torch.library.opcheck(gated_op, (gate.clone().requires_grad_(), up.clone().requires_grad_(), function))
        torch.library.opcheck(gated_backward_op, (dout, gate, up, function))
        torch.library.opcheck(fused_op, (torch.randn(3, 10, requires_grad=True), function))
        torch.library.opcheck(fused_backward_op, (dout, torch.randn(3, 10), function))
    for function in ("gelu", "gelu_erf"):
        torch.library.opcheck(gelu_op, (gate.clone().requires_grad_(), function))
        torch.library.opcheck(gelu_backward_op, (dout, gate, function))
    for ours, _, count in FUNCTIONS.values():
        inputs = (gate, up)[:count]
        assert torch.equal(torch.compile(ours, backend="aot_eager", fullgraph=True)(*inputs), ours(*inputs))


def test_operators_pass_torchs_checks(interpreter: WorkerPool) -> None:
    interpreter.run(check_operators, 1, timeout=300)


def test_contradictions_are_refused() -> None:
    for function in (swiglu, geglu):
        integers = torch.zeros(2, 3, dtype=torch.int32)
        for gate, up in (
            (torch.zeros(2, 3), torch.zeros(2, 4)),
            (torch.zeros(2), torch.zeros(2)),
            (integers, integers),
        ):
            with pytest.raises(ValueError, match="need"):
                function(gate, up)
        for fused in (torch.zeros(2, 3), torch.zeros(4), torch.zeros(2, 4, dtype=torch.int32)):
            with pytest.raises(ValueError, match="need"):
                function(fused)
        with pytest.raises(ValueError, match="float64"):
            function(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.float64))
    for x in (torch.zeros(2), torch.zeros(2, 3, dtype=torch.int32)):
        with pytest.raises(ValueError, match=r"need \[T, F\]"):
            gelu(x)
