"""Ranks that torchrun has started: a signal stops all of them behind the same step, and none outlives torchrun."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from megapar.cli import main
from tests.cli.conftest import clean_environment
from tests.cli.test_cli_launch import HANG_S, alive, children_of, wait_for
from tests.faults.runs import Runs, fault, hydra


@pytest.fixture(scope="module")
def runs(tokens: str, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("torchrun"), tokens, ["parallel=dp2", "train.steps=8"])


class Torchrun:
    """torchrun with two ranks in `folder`, held for some seconds in step 3."""

    def __init__(self, runs: Runs, folder: Path, *overrides: str) -> None:
        self.folder = folder
        plan = f"fault.plan={hydra([fault(0, 3, 'opt', 'delay', seconds=4.0)])}"
        words = [*runs.words, "checkpoint.every=0", f"run.dir={folder}", plan, *overrides]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        self.process = subprocess.Popen(
            [*command, "-m", "megapar.cli", *words],
            env=clean_environment() | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def ranks_in_step_3(self) -> list[int]:
        assert wait_for(lambda: any((self.folder / ".faults").glob("*")), HANG_S)
        return children_of(self.process.pid)


@pytest.fixture
def start(runs: Runs, tmp_path: Path) -> Iterator[Callable[..., Torchrun]]:
    started: list[Torchrun] = []

    def start(*overrides: str) -> Torchrun:
        started.append(Torchrun(runs, tmp_path / "run", *overrides))
        return started[-1]

    yield start
    for one in started:
        with suppress(ProcessLookupError):
            os.killpg(one.process.pid, signal.SIGKILL)
        one.process.communicate()


@pytest.mark.more
def test_a_signal_to_one_rank_stops_all_behind_the_step(start: Callable[..., Torchrun], runs: Runs) -> None:
    torchrun = start()
    ranks = torchrun.ranks_in_step_3()
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGUSR1)
    said, _ = torchrun.process.communicate(timeout=HANG_S)
    assert "exitcode  : 85" in said, said  # torchrun's table of what it takes for failures
    assert [path.name for path in (torchrun.folder / "checkpoints").glob("step-*")] == ["step-00000003"]
    assert main([*runs.words, f"run.dir={torchrun.folder}"]) == 0
    runs.compare(torchrun.folder)


@pytest.mark.more
def test_no_rank_outlives_torchrun(start: Callable[..., Torchrun]) -> None:
    torchrun = start("train.steps=1000000")
    ranks = torchrun.ranks_in_step_3()
    torchrun.process.kill()
    torchrun.process.wait()
    assert wait_for(lambda: not any(map(alive, ranks)), HANG_S)
