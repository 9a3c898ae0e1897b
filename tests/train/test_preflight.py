"""The check before the first step: fit ranks pass in a line, and each fault is one line that names its rank."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megapar.config.errors import UserError
from megapar.config.schema import TrainConfig
from megapar.launch.pool import PoolError, WorkerPool
from megapar.train import preflight
from megapar.train.hooks.preflight import Preflight
from megapar.train.loop import Loop
from megapar.train.trainer import Trainer
from tests.tiny import tiny_config

BAD = 1


class WrongProduct(TorchDispatchMode):
    """One element of every product in fp32 is off by its last bit."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket.__name__ == "mm" and result.dtype == torch.float32:
            result.view(-1)[7] += 2.0**-10
        return result


class Usage(NamedTuple):
    free: int = 1000


@contextmanager
def link(change: Any) -> Iterator[None]:
    """change: what becomes of BAD's message to rank 2; None: it is not sent."""
    plain = dist.isend

    def isend(tensor: torch.Tensor, target: int, **options: Any) -> Any:
        if target != 2:
            return plain(tensor, target, **options)
        return mock.Mock() if change is None else plain(change(tensor), target, **options)

    with mock.patch.object(dist, "isend", isend):
        yield


@contextmanager
def fault(kind: str) -> Iterator[None]:
    patches: dict[str, Any] = {
        "product": WrongProduct(),
        "memory": mock.patch.object(preflight, "free_memory", lambda device: 5 << 20),
        "disk": mock.patch.object(preflight.shutil, "disk_usage", lambda folder: Usage()),
        "clock": mock.patch.object(preflight.time, "time", lambda: time.monotonic()),
        "silent link": link(None),
        "garbled link": link(lambda message: message + 1),
        "no answer": mock.patch.object(preflight._Answers, "gather", lambda *given: time.sleep(3)),
    }
    with patches[kind]:
        yield


def run_preflight(rank: int, world_size: int, config: TrainConfig, kind: str | None, bad: int) -> str:
    """The line that says that all are fit, or the error; also in a file: a silent link ends the group."""
    line = _line(rank, config, kind, bad)
    (Path(str(config.run.dir)) / f"said-{rank}").write_text(line)
    return line


def _line(rank: int, config: TrainConfig, kind: str | None, bad: int) -> str:
    trainer = Trainer(config, rank)
    short = {"LINKS_S": 1.0, "ANSWER_S": 1.5} if kind == "no answer" else {"LINKS_S": 1.0} if kind else {}
    with ExitStack() as stack:
        for name, value in short.items():
            stack.enter_context(mock.patch.object(preflight, name, value))
        if rank == bad and kind is not None:
            stack.enter_context(fault(kind))
        try:
            return preflight.preflight(trainer, Path(str(config.run.dir)))
        except (UserError, TypeError) as error:  # one that never answers ends in its own way
            return str(error)


def config_of(tokens: str, folder: Path, layout: str, **values: Any) -> TrainConfig:
    given: dict[str, Any] = {"run.dir": str(folder), "logger.wandb.mode": "disabled", "train.steps": 1}
    return tiny_config(tokens, layout, **given | values)


@pytest.mark.parametrize("layout", ["single", "dp4"])
def test_fit_ranks_pass(layout: str, pool: WorkerPool, tokens: str, tmp_path: Path) -> None:
    config = config_of(tokens, tmp_path, layout)
    ranks = config.parallel.layout.world
    said = pool.run(run_preflight, ranks, config, None, 0)
    begins = f"preflight   {ranks} rank{'s' if ranks > 1 else ''} multiply rightly and hear each other, at least "
    assert all(line.startswith(begins) for line in said)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("product", "rank 1 multiplies wrongly: 8 of 524288 elements of products of whole numbers in fp32;"),
        ("memory", "rank 1 has 5 MiB of free memory; a run needs at least 256"),
        ("disk", "rank 1 has 0 MiB in the run's directory, and a checkpoint takes about "),
        ("clock", "rank 1's clock is "),
        ("silent link", "no message within 1 s from rank 1 to rank 2;"),
        ("garbled link", "a message from rank 1 arrived changed at rank 2;"),
        ("no answer", "rank 1 did not answer within 1.5 s;"),
    ],
)
def test_a_fault_names_its_rank(kind: str, text: str, pool: WorkerPool, tokens: str, tmp_path: Path) -> None:
    with suppress(PoolError) if kind == "silent link" else nullcontext():
        pool.run(run_preflight, 4, config_of(tokens, tmp_path, "dp4"), kind, BAD)
    said = [(tmp_path / f"said-{rank}").read_text() for rank in range(4)]
    others = [line for rank, line in enumerate(said) if kind != "no answer" or rank != BAD]
    assert len(set(others)) == 1 and "\n" not in others[0]
    assert others[0].startswith(f"run.preflight=true: {text}")


def test_a_checkpoint_takes_about_what_is_said(tokens: str, tmp_path: Path) -> None:
    config = config_of(tokens, tmp_path, "single")
    loop = Loop(config, 0)
    loop.run()
    written = sum(path.stat().st_size for path in (tmp_path / "checkpoints" / "step-00000001").iterdir())
    assert preflight._state_bytes(Trainer(config, 0)) == pytest.approx(written, rel=0.25)


def test_the_line_comes_before_the_first_step(tokens: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(tokens, tmp_path, "single", **{"run.preflight": True})
    assert Preflight.wanted(config)
    Loop(config, 0).run()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("preflight   1 rank multiply") and lines[1].startswith("step      1")
