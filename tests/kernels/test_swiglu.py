"""SwiGLU: the interpreted kernels against torch in fp64, and torch's own checks of the operators."""

import pytest
import torch

from megapar.kernels.swiglu import swiglu
from megapar.launch.pool import WorkerPool
from tests.kernels import cases


@pytest.mark.parametrize("dtype", list(cases.DTYPES))
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 17), (65, 64), (7, 2051)])
def test_interpreted(interpreter: WorkerPool, dtype: str, rows: int, columns: int) -> None:
    """No error is more than twice torch's in the same dtype, or a few of fp32's last bits of the largest value."""
    for error, plain, size in interpreter.run(cases.swiglu_errors, 1, dtype, rows, columns)[0]:
        assert error <= 2 * plain + 4 * torch.finfo(torch.float32).eps * max(1.0, size)


def test_operators_pass_torchs_checks(interpreter: WorkerPool) -> None:
    interpreter.run(cases.check_swiglu_operators, 1, timeout=300)


def test_contradictions_are_refused() -> None:
    for gate, up in ((torch.zeros(2, 3), torch.zeros(2, 4)), (torch.zeros(2), torch.zeros(2))):
        with pytest.raises(ValueError, match="need"):
            swiglu(gate, up)
    with pytest.raises(ValueError, match="float64"):
        swiglu(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.float64))
