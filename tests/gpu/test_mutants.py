"""With any one kernel's output scaled by 1.001 the acceptance is red, and says where."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from megapar.launch.pool import WorkerPool
from tests.gpu import mutants
from tests.gpu.conftest import Accept

BY_COMMAND = ("layernorm_weight_grad_kernel", "gathered_product_kernel")


def test_no_kernel_is_left_out() -> None:
    assert set(mutants.kernels_of_registry()) == set(mutants.SECTIONS)


@pytest.mark.parametrize("kernel", BY_COMMAND)
def test_the_command_is_red_and_names_the_check(kernel: str, accept: Accept) -> None:
    section = mutants.SECTIONS[kernel]
    outcome = accept("--only", section, MEGAPAR_MUTANT=kernel)
    assert outcome.code == 1 and outcome.wrong(), outcome.said[-2000:]
    assert all(name.startswith(f"{section}: ") and f"WRONG {name}" in outcome.said for name in outcome.wrong())


def wrong_checks(rank: int, ranks: int, kernel: str | None, section: str) -> list[str]:
    """Checks of a section, run in this process, that say no."""
    from experiments.gpu.run import Run
    from experiments.gpu.section import read
    from experiments.gpu.table import Row

    rows = list[Row]()
    patch = None if kernel is None else mutants.apply(kernel)
    try:
        with TemporaryDirectory() as folder:
            (Path(folder) / "work").mkdir()
            run = Run(section, Path(folder), 120.0, "cpu", 1, {}, rows.append)
            read(section).SECTION.run(run)
    finally:
        if patch is not None:
            patch.stop()
    assert rows
    return [row["check"] for row in rows if row["ok"] is False]


@pytest.fixture(scope="module")
def workers() -> Iterator[WorkerPool]:
    """One process, and no other test's: a section changes what torch is asked for."""
    with WorkerPool(1, interpret=True) as pool:
        yield pool


@pytest.mark.more
@pytest.mark.parametrize("kernel", [kernel for kernel in mutants.SECTIONS if kernel not in BY_COMMAND])
def test_every_kernel(kernel: str, workers: WorkerPool, accept: Accept) -> None:
    section = mutants.SECTIONS[kernel]
    if section == "pair":  # has processes of its own, which a worker can't
        test_the_command_is_red_and_names_the_check(kernel, accept)
    else:
        assert workers.run(wrong_checks, 1, kernel, section, timeout=300) != [[]]


@pytest.mark.more
@pytest.mark.parametrize("section", sorted({*mutants.SECTIONS.values()} - {"pair"}))
def test_unchanged_kernels_are_right(section: str, workers: WorkerPool) -> None:
    assert workers.run(wrong_checks, 1, None, section, timeout=300) == [[]]
