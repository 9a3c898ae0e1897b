"""Saves that are not waited for: the state of their step whatever comes behind it, one at a time, reported alike."""

import importlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import pytest

from megapar.checkpoint import find_checkpoint, read_manifest, save
from megapar.checkpoint.format import verify_files
from megapar.config.errors import UserError
from megapar.config.schema import TrainConfig
from megapar.launch.pool import WorkerPool
from megapar.stop import StopRequest, set_stop_request
from megapar.train.hooks.save import Save
from megapar.train.loop import Loop
from megapar.train.metrics import MetricsWriter
from megapar.train.states import Saver
from megapar.train.trainer import Trainer
from tests.tiny import tiny_config

MODULE = importlib.import_module("megapar.checkpoint.save")  # and not the function of that name
HANG_S = 60
QUIET = {"logger.wandb.mode": "disabled", "logger.progress": False}


class SlowWriter:
    """`write_file` that waits until it may begin. began: the steps whose files it was asked for."""

    def __init__(self) -> None:
        self.plain, self.go = MODULE.write_file, threading.Event()
        self.began: list[str] = []

    def __call__(self, path: Path, tensors: Any, at: Any) -> Any:
        self.began.append(path.parent.name.partition(".")[0])
        assert self.go.wait(HANG_S)
        return self.plain(path, tensors, at)


@contextmanager
def slow_writer() -> Iterator[SlowWriter]:
    writer = SlowWriter()
    with mock.patch.object(MODULE, "write_file", writer):
        yield writer
        writer.go.set()


def thread_of(saver: Saver) -> threading.Thread:
    assert saver._under_way is not None
    return saver._under_way[1]


def steps_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("step-*"))


def overwritten_at_once(rank: int, world_size: int, config: TrainConfig, waited: str, not_waited: str) -> None:
    """Two steps, and the state saved both ways; in the second all of it changes before a byte is written."""
    trainer = Trainer(config, rank)
    for step in (1, 2):
        trainer.step(step)
    tokens = 2 * trainer.task.tokens_per_step
    save(Path(waited) / "checkpoints", trainer.optimizer, config, 2, sync=trainer.sync, tokens=tokens)
    saver = Saver(Path(not_waited), None)
    with slow_writer() as writer:
        saver.save(2, trainer, config, wait=False)
        for tensors in trainer.optimizer.tensors().values():
            for tensor in tensors:
                tensor.fill_(7.0)
        for kinds in trainer.sync.carried():
            for values in kinds.values():
                values.fill_(7.0)
        trainer.optimizer.steps = 99
        writer.go.set()
        saver.settle()
    trainer.close()


@pytest.mark.parametrize(
    ("layout", "values"),
    [
        ("single", {}),
        ("tp2dp2", {"parallel.zero": 1, "train.dtype": "fp32", "parallel.grad_compression": "int8_ef"}),
    ],
    ids=["single", "tp2dp2"],
)
def test_what_is_saved_is_the_state_of_the_step(
    layout: str, values: dict[str, Any], pool: WorkerPool, tokens: str, tmp_path: Path
) -> None:
    config = tiny_config(tokens, layout, **values)
    folders = [tmp_path / name for name in ("waited", "not_waited")]
    pool.run(overwritten_at_once, config.parallel.layout.world, config, *map(str, folders))
    first, second = (folder / "checkpoints" / "step-00000002" for folder in folders)
    assert read_manifest(first) == read_manifest(second) and read_manifest(first).tokens == 2 * 8 * 8
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


def test_two_saves_never_interleave_and_latest_is_durable(tokens: str, tmp_path: Path) -> None:
    """The second waits for the first. Until that is whole, nothing of it has a name."""
    config, folder = tiny_config(tokens), tmp_path / "checkpoints"
    trainer, saver, waits = Trainer(config, 0), Saver(tmp_path, None), threading.Event()
    with slow_writer() as writer:
        saver.save(1, trainer, config, wait=False)
        saver.look()
        assert not (folder / "latest").exists() and not (folder / "step-00000001").exists()
        first, plain = thread_of(saver), threading.Thread.join

        def join(thread: threading.Thread, *given: Any) -> None:
            if thread is first:
                waits.set()
            plain(thread, *given)

        with mock.patch.object(threading.Thread, "join", join):
            second = threading.Thread(target=saver.save, args=(2, trainer, config), kwargs={"wait": False})
            second.start()
            assert waits.wait(HANG_S)
            assert writer.began == ["step-00000001"] and len(steps_in(folder)) == 1
            writer.go.set()
            second.join()
        assert find_checkpoint(folder).name == "step-00000001"
        saver.settle()
    assert writer.began == ["step-00000001", "step-00000002"]
    assert steps_in(folder) == writer.began and find_checkpoint(folder).name == "step-00000002"
    trainer.close()


def test_memory_is_taken_once(tokens: str, tmp_path: Path) -> None:
    config = tiny_config(tokens)
    trainer, saver, places = Trainer(config, 0), Saver(tmp_path, None), []
    for step in (1, 2, 3):
        saver.save(step, trainer, config, wait=False)
        saver.settle()
        places.append({name: tensor.data_ptr() for name, tensor in saver._host._tensors.items()})
    assert places[0] == places[1] == places[2] and len(places[0]) > 10
    trainer.close()


def one_rank_is_late(rank: int, world_size: int, config: TrainConfig, folder: str) -> list[bool]:
    """Whether there is a `latest` once rank 0 has written, and once all have."""
    trainer, saver, found = Trainer(config, rank), Saver(Path(folder), None), []
    with slow_writer() as writer:
        saver.save(1, trainer, config, wait=False)
        for last in (0, 1):
            if rank <= last:
                writer.go.set()
                thread_of(saver).join()
            saver.look()
            found.append((Path(folder) / "checkpoints" / "latest").exists())
    trainer.close()
    return found


def test_a_checkpoint_waits_for_every_rank(pool: WorkerPool, tokens: str, tmp_path: Path) -> None:
    found = pool.run(one_rank_is_late, 2, tiny_config(tokens, "tp2"), str(tmp_path))
    assert [one[0] for one in found] == [False, False] and found[0][1]


def a_disk_fills(rank: int, world_size: int, config: TrainConfig, step: int) -> str:
    """The line with which a run ends where rank 1 can't write the checkpoint of a step."""
    plain, look = MODULE.write_file, Saver.look

    def write_file(path: Path, tensors: Any, at: Any) -> Any:
        if rank == 1 and path.parent.name.startswith(f"step-{step:08d}"):
            path.write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        return plain(path, tensors, at)

    def looks_late(saver: Saver) -> None:
        if saver._under_way is not None:
            saver._under_way[1].join()
        look(saver)

    with mock.patch.object(MODULE, "write_file", write_file), mock.patch.object(Saver, "look", looks_late):
        try:
            Loop(config, rank).run()
        except UserError as error:
            return str(error)
    return "no failure"


def test_a_failed_write_is_said_at_the_next_step_on_all_ranks(pool: WorkerPool, tokens: str, tmp_path: Path) -> None:
    values: dict[str, Any] = {"run.dir": str(tmp_path), "checkpoint.every": 1, "checkpoint.keep": 1, "train.steps": 6}
    values |= QUIET | {"checkpoint.async_save": True}
    lines = pool.run(a_disk_fills, 2, tiny_config(tokens, "tp2", **values), 3)
    folder = tmp_path / "checkpoints"
    assert lines[0] == lines[1] and "\n" not in lines[0]
    assert "rank-00001.safetensors: the checkpoint can't be written (No space left on device); make room" in lines[0]
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]  # the step behind it, and no more
    assert steps_in(folder) == ["step-00000002"] and find_checkpoint(tmp_path).name == "step-00000002"
    verify_files(folder / "step-00000002", read_manifest(folder / "step-00000002"))


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_it_leaves_when_it_waits(tokens: str, tmp_path: Path) -> None:
    found = {}
    for way in (False, True):
        folder = tmp_path / str(way)
        folder.mkdir()
        values: dict[str, Any] = QUIET | {"run.dir": str(folder), "checkpoint.every": 2, "train.steps": 5}
        Loop(tiny_config(tokens, **values | {"checkpoint.async_save": way}), 0).run()
        files = list((folder / "checkpoints").rglob("*.safetensors"))
        found[way] = {path.relative_to(folder): path.read_bytes() for path in files}
        assert find_checkpoint(folder).name == "step-00000005"
    assert found[True] == found[False] and len(found[True]) == 3


def test_a_stop_waits_for_its_checkpoint(tokens: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where that step's is under way already."""
    values: dict[str, Any] = QUIET | {"run.dir": str(tmp_path), "checkpoint.every": 1, "checkpoint.async_save": True}
    said: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(
        MetricsWriter, "say", lambda self, text: said.append((text, steps_in(tmp_path / "checkpoints")))
    )
    (tmp_path / "asked").mkdir()
    (tmp_path / "asked" / "stop").touch()
    set_stop_request(StopRequest(tmp_path / "asked"))
    try:
        Loop(tiny_config(tokens, **values), 0).run()
    finally:
        set_stop_request(StopRequest())
    ((line, there),) = [one for one in said if "interrupted; " in one[0]]
    assert line.endswith("step-00000001 has its state") and there == ["step-00000001"]


def by_the_clock(rank: int, world_size: int, config: TrainConfig) -> None:
    """A run in which a step takes 25 s by rank 0's clock, and no time by the other's."""
    now, loop = [0.0], Loop(config, rank)
    (hook,) = (one for one in loop.hooks if isinstance(one, Save))
    hook.clock = lambda: now[0]
    plain = loop.trainer.step

    def step(*given: Any) -> Any:
        now[0] += 25.0 if rank == 0 else 0.0
        return plain(*given)

    with mock.patch.object(loop.trainer, "step", step):
        loop.run()


def test_all_ranks_save_by_the_clock_of_the_first(pool: WorkerPool, tokens: str, tmp_path: Path) -> None:
    values: dict[str, Any] = QUIET | {"run.dir": str(tmp_path), "checkpoint.every_minutes": 1.0, "train.steps": 7}
    pool.run(by_the_clock, 2, tiny_config(tokens, "dp2", **values))
    assert steps_in(tmp_path / "checkpoints") == [f"step-{step:08d}" for step in (3, 6, 7)]


@pytest.mark.slow
def test_the_stall_is_a_tenth_of_a_save(tokens: str, tmp_path: Path) -> None:
    """A state of 0.4 GB. The first copy, which takes its memory, doesn't count."""
    values: dict[str, Any] = {"model.hidden": 1024, "model.ffn": 4096, "model.heads": 16, "model.kv_heads": 16}
    config = tiny_config(tokens, **values, **{"train.dtype": "fp32"})
    trainer, saver = Trainer(config, 0), Saver(tmp_path, None)
    times: dict[bool, list[float]] = {True: [], False: []}
    for step in range(1, 10):
        wait = bool(step % 2)
        start = time.perf_counter()
        saver.save(step, trainer, config, wait=wait)
        times[wait].append(time.perf_counter() - start)
        if saver._under_way is not None:
            thread_of(saver).join()
        start = time.perf_counter()
        saver.settle()
        times[wait][-1] += time.perf_counter() - start
    stall, whole = median(times[False][1:]), median(times[True][1:])
    print(f"stall {stall:.3f} s, waited for {whole:.3f} s, {stall / whole:.1%}")
    assert stall <= 0.1 * whole
    trainer.close()
