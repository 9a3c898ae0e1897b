"""Processes whose Triton kernels run in Triton's interpreter. That is fixed when a process imports them."""

from typing import Any

import pytest

from megapar.kernels import has_triton
from megapar.launch.pool import WorkerPool
from tests.kernels import cases

collect_ignore_glob = [] if has_triton() else ["*"]


@pytest.fixture(scope="session")
def outcomes(request: pytest.FixtureRequest, interpreter: WorkerPool) -> dict[cases.Case, cases.Outcome]:
    """What came out of every attention case that a selected test asks for; the two processes share them."""
    parameters: list[Any] = [getattr(item, "callspec", None) for item in request.session.items]
    chosen = [spec.params["attention_case"] for spec in parameters if spec and "attention_case" in spec.params]
    parts = interpreter.run(cases.run_share, 2, chosen, timeout=1200)
    return {case: outcome for part in parts for case, outcome in part}
