"""RMSNorm and LayerNorm: both backends against autograd in fp64, beside torch's own in the same dtype."""

from itertools import product
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megapar.kernels import layernorm as layer
from megapar.kernels import rmsnorm as rms
from megapar.kernels import use_backend
from megapar.launch.pool import WorkerPool
from tests.kernels.cases import DTYPES, distance, poisoned_memory

EPS = 1e-5
SIZES = [(1, 1), (3, 17), (5, 130), (300, 40), (2, 2051)]
NAMES = ("y", "h", "dx", "dweight", "dbias")


def given(tokens: int, hidden: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Values that the dtype holds, of a mean that is not 0; x and residual are slices of wider matrices."""
    generator = torch.Generator().manual_seed(tokens * hidden)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    made = {name: draw(tokens, hidden + 3)[:, 1 : hidden + 1] + 0.5 for name in ("x", "residual")}
    return made | {
        "weight": draw(hidden) + 1, "bias": draw(hidden), "dy": draw(tokens, hidden), "dh": draw(tokens, hidden),
    }  # fmt: skip


def by_autograd(kind: str, values: dict[str, Tensor], fused: bool) -> list[Tensor]:
    """y, h, dx, dweight (, dbias) by torch's own norms in the dtype of the values."""
    x, weight, bias = (values[name].detach().requires_grad_() for name in ("x", "weight", "bias"))
    h = x + values["residual"] if fused else x * 1
    if kind == "rms":
        y, weights = F.rms_norm(h, weight.shape, weight, EPS), [weight]
    else:
        y, weights = F.layer_norm(h, weight.shape, weight, bias, EPS), [weight, bias]
    outputs, gradients = ([y, h], [values["dy"], values["dh"]]) if fused else ([y], [values["dy"]])
    return [y, h, *torch.autograd.grad(outputs, [x, *weights], gradients)]


def by_kernels(kind: str, values: dict[str, Tensor], fused: bool, dtype: torch.dtype) -> list[Tensor]:
    x, weight, bias, dy = (values[name] for name in ("x", "weight", "bias", "dy"))
    residual, dh = (values["residual"], values["dh"]) if fused else (None, None)
    weights: tuple[Tensor, ...]
    if kind == "rms":
        y, h, rstd = rms.rmsnorm(x, weight, EPS, residual)
        dx, weights = rms.rmsnorm_input_grad(dy, h, weight, rstd, dh), (rms.rmsnorm_weight_grad(dy, h, rstd),)
    else:
        y, h, mean, rstd = layer.layernorm(x, weight, bias, EPS, residual)
        dx = layer.layernorm_input_grad(dy, h, weight, mean, rstd, dh)
        weights = layer.layernorm_weight_grad(dy, h, mean, rstd)
    assert {y.dtype, h.dtype, dx.dtype} == {dtype} and {rstd.dtype, *(w.dtype for w in weights)} == {torch.float32}
    return [y, h, dx, *weights]


def errors(rank: int, world_size: int, backend: str, kind: str) -> list[tuple[str, float, float, float]]:
    """(case, error, torch's in the same dtype, largest value) of every output, against fp64."""
    found = []
    for (name, dtype), (tokens, hidden), fused in product(DTYPES.items(), SIZES, (False, True)):
        values = given(tokens, hidden, dtype)
        use_backend(backend)
        with poisoned_memory():
            ours = by_kernels(kind, values, fused, dtype)
        plain = by_autograd(kind, values, fused)
        exact = by_autograd(kind, {key: value.double() for key, value in values.items()}, fused)
        for output, a, b, c in zip(NAMES, ours, plain, exact, strict=False):
            case = f"{name} {tokens}x{hidden} {'of a sum' if fused else ''} {output}"
            found.append((case, distance(a.double(), c), distance(b.double(), c), float(c.abs().max())))
    return found


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("backend", ["torch", "interpret"])
def test_against_fp64(backend: str, kind: str, interpreter: WorkerPool) -> None:
    """No error is more than twice torch's own in the same dtype, or 16 of fp32's roundings of the largest value: what
    sums of up to 2,051 terms in another order leave. Gradients of weights are fp32 here, and in torch's the dtype's.

    In 16 bits h is rounded before it is normalised, in torch's as in ours, so both are that far from fp64's."""
    for case, error, plain, size in interpreter.run(errors, 1, backend, kind, timeout=300)[0]:
        assert error <= 2 * plain + 16 * torch.finfo(torch.float32).eps * max(1.0, size), case


def weight_gradients(rank: int, world_size: int, kind: str) -> list[list[Tensor]]:
    """Those of 700 rows, six blocks of them: as the programs of a launch come, and with the last program first."""
    from triton.runtime.interpreter import interpreter_builder as grid

    use_backend("interpret")
    values, set_place = given(700, 40, torch.bfloat16), grid.set_grid_idx

    def from_the_end(*place: int) -> None:
        set_place(*(size - 1 - index for size, index in zip(grid.grid_dim, place, strict=True)))

    with poisoned_memory():
        first = by_kernels(kind, values, True, torch.bfloat16)[3:]
        with patch.object(grid, "set_grid_idx", from_the_end):
            return [first, by_kernels(kind, values, True, torch.bfloat16)[3:]]


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_weight_gradients_have_the_same_bits_in_any_order(kind: str, interpreter: WorkerPool) -> None:
    """A GPU runs blocks of rows in an order of its own, so two runs have the same bits if none depends on another."""
    (first, again), (other, _) = interpreter.run(weight_gradients, 2, kind)
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def check_operators(rank: int, world_size: int) -> None:
    use_backend("interpret")
    values = given(3, 5, torch.float32)
    x, residual, weight, bias, dy, dh = (values[n] for n in ("x", "residual", "weight", "bias", "dy", "dh"))
    column = torch.rand(3)
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (rms.rmsnorm_op, (x, weight, EPS)),
        (rms.add_rmsnorm_op, (x, residual, weight, EPS)),
        (rms.rmsnorm_input_grad_op, (dy, x, weight, column, dh)),
        (rms.rmsnorm_input_grad_op, (dy, x, weight, column, None)),
        (rms.rmsnorm_weight_grad_op, (dy, x, column)),
        (layer.layernorm_op, (x, weight, bias, EPS)),
        (layer.add_layernorm_op, (x, residual, weight, bias, EPS)),
        (layer.layernorm_input_grad_op, (dy, x, weight, column, column, dh)),
        (layer.layernorm_input_grad_op, (dy, x, weight, column, column, None)),
        (layer.layernorm_weight_grad_op, (dy, x, column, column)),
    ]
    for operator, arguments in calls:
        # None of them has a gradient of its own, so what autograd would do is not a question.
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_operators_pass_torchs_checks(interpreter: WorkerPool) -> None:
    interpreter.run(check_operators, 1, timeout=300)


def empty(rank: int, world_size: int, backend: str) -> None:
    use_backend(backend)
    for tokens, hidden in ((0, 4), (2, 4)):
        values = given(tokens, hidden, torch.float32)
        for kind, fused in product(("rms", "layer"), (False, True)):
            outputs = by_kernels(kind, values, fused, torch.float32)
            assert [len(x) for x in outputs] == [tokens] * 3 + [hidden] * (len(outputs) - 3)
            if not tokens:
                assert all(not x.any() for x in outputs[3:])


@pytest.mark.parametrize("backend", ["torch", "interpret"])
def test_no_tokens(backend: str, interpreter: WorkerPool) -> None:
    interpreter.run(empty, 1, backend)


def test_contradictions_are_refused() -> None:
    x, weight = torch.zeros(2, 3), torch.zeros(3)
    for one, w, residual in (
        (x[0], weight, None),
        (x, weight[:2], None),
        (x, weight, x[:1]),
        (x, weight, x.double()),
        (x.int(), weight, None),
        (x, weight.int(), None),
    ):
        with pytest.raises(ValueError, match="need"):
            rms.rmsnorm(one, w, EPS, residual)
        with pytest.raises(ValueError, match="need"):
            layer.layernorm(one, w, w, EPS, residual)
    for bias in (weight[:2], weight.int()):
        with pytest.raises(ValueError, match="need"):
            layer.layernorm(x, weight, bias, EPS)
    for narrow in (weight[:2], weight[:, None], weight.int()):
        with pytest.raises(ValueError, match=r"weight .* need .* \[H\]"):
            rms.rmsnorm_input_grad(x, x, narrow, x[:, 0])
        with pytest.raises(ValueError, match=r"weight .* need .* \[H\]"):
            layer.layernorm_input_grad(x, x, narrow, x[:, 0], x[:, 0])
    integers, column = x.int(), x[:, 0]
    wrong = ((x[:1], x, column), (x, x, weight), (x.t(), x, column))
    for dy, h, rstd in (*wrong, (integers, x, column), (x, integers, column), (x, x, column.int())):
        for gradient in (
            lambda: rms.rmsnorm_input_grad(dy, h, weight, rstd),  # noqa: B023
            lambda: rms.rmsnorm_weight_grad(dy, h, rstd),  # noqa: B023
            lambda: layer.layernorm_input_grad(dy, h, weight, rstd, rstd),  # noqa: B023
            lambda: layer.layernorm_weight_grad(dy, h, rstd, rstd),  # noqa: B023
        ):
            with pytest.raises(ValueError, match=r"need \[T, H\] and \[T\]"):
                gradient()
