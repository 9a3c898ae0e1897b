"""A run goes on from its newest whole checkpoint; each file is hashed once, and a rank reads its shard alone."""

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from megapar.checkpoint import find_checkpoint, format, read_manifest
from megapar.checkpoint.load import CheckpointReader, load
from megapar.checkpoint.save import frozen_hashes
from megapar.config.errors import ConfigError, UserError
from megapar.config.file import dump
from megapar.config.keys import changed
from megapar.config.schema import TrainConfig
from megapar.launch import resume
from megapar.launch.copies import Copies
from megapar.launch.pool import WorkerPool
from megapar.parallel.boxes import owned_boxes
from megapar.train.trainer import Trainer
from tests.checkpoint import jobs
from tests.tiny import tiny_config

FIRST, SECOND, MANIFEST = "rank-00000.safetensors", "rank-00001.safetensors", "manifest.json"


@pytest.fixture(scope="module")
def written(pool: WorkerPool, tokens: str, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """The config of a run with checkpoints of steps 1 and 2, of two files each."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = tiny_config(tokens, "tp2", **{"run.dir": str(folder)})
    for step in (1, 2):
        pool.run(jobs.run, 2, config, step, None, str(folder / "checkpoints"))
    (folder / "config.yaml").write_text(dump(config))
    return config


@pytest.fixture
def config(written: TrainConfig, tmp_path: Path) -> TrainConfig:
    """The same, of a copy to damage."""
    shutil.copytree(str(written.run.dir), tmp_path / "run")
    return changed(written, {"run.dir": str(tmp_path / "run")})


def step_folder(config: TrainConfig, step: int) -> Path:
    return Path(str(config.run.dir)) / "checkpoints" / f"step-{step:08d}"


def damages(folder: Path) -> list[tuple[str, Callable[[], object], set[str]]]:
    """(what, does it, the files of which one must be named) for truncations, flips, deletions and a swap."""
    random = np.random.default_rng(20)
    cases: list[tuple[str, Callable[[], object], set[str]]] = []
    for path in (folder / FIRST, folder / SECOND, folder / MANIFEST):
        size = path.stat().st_size
        for length in (0, 1, size // 2, size - 1, *random.integers(0, size, 4).tolist()):
            cases.append((f"{path.name} cut to {length}", partial(os.truncate, path, length), {str(path)}))
        for offset in (0, size - 1, *random.integers(0, size, 12).tolist()):
            bit = 1 << int(random.integers(8))
            cases.append((f"{path.name} byte {offset}", partial(flip, path, offset, bit), {str(path)}))
        cases.append((f"{path.name} deleted", path.unlink, {str(path)}))
    for one, other in ((FIRST, SECOND), (FIRST, MANIFEST)):
        both = folder / one, folder / other
        cases.append((f"{one} and {other} swapped", partial(swap, *both), set(map(str, both))))
    return cases


def flip(path: Path, offset: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= bit
    path.write_bytes(data)


def swap(one: Path, other: Path) -> None:
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def test_every_damage_is_seen_named_and_passed_over(config: TrainConfig) -> None:
    folder, earlier = step_folder(config, 2), step_folder(config, 1)
    assert resume.decide(config).load == str(folder)
    good = {path: path.read_bytes() for path in folder.iterdir()}
    cases = damages(folder)
    assert len(cases) >= 60
    for what, damage, named in cases:
        damage()
        start = resume.decide(config)
        assert (start.way, start.step, start.load) == ("back", 1, str(earlier)), what
        assert any(f"{path}: " in start.said[0] for path in named) and "\n" not in start.said[0], what
        with pytest.raises(UserError) as caught:
            CheckpointReader.verified(folder, read_manifest(folder))
        assert any(str(caught.value).startswith(f"{path}: ") for path in named), what
        for path, data in good.items():
            path.write_bytes(data)
    assert resume.decide(config).load == str(folder)


def test_steps_that_have_changed_places(config: TrainConfig) -> None:
    """Whatever their names say, the state of step 2 is not taken for that of step 1."""
    first, second = step_folder(config, 1), step_folder(config, 2)
    between = first.with_name("between")
    for one, name in ((first, between), (second, first), (between, second)):
        one.rename(name)
    with pytest.raises(UserError, match=f"{second}/{MANIFEST}: is of step 1, so it was moved"):
        resume.decide(config)


@pytest.mark.parametrize(
    "garbage", [b"null", b"17", b"[1, 2]", b'{"step": "2"}', b'{"step": null}', b"\xff", b'{"st', b""]
)
def test_what_is_no_row_is_not_gone_on_from(config: TrainConfig, garbage: bytes) -> None:
    """Rows of steps up to the checkpoint stay, each as it is; those that lack are said."""
    path = Path(str(config.run.dir)) / "metrics.jsonl"
    rows = [b'{"step": 1, "loss": 0.5}', b'{"step": 2, "val_loss": 1}', b'{"step": 3, "loss": 0.5}']
    path.write_bytes(b"\n".join([rows[0], garbage, *rows[1:]]) + b"\n")
    said = resume.prepare(config, resume.decide(config))
    assert path.read_bytes() == b"\n".join(rows[:2]) + b"\n"
    assert said == [f"run: {path}: no row of step 2, which has been cut or changed"]


def test_metrics_that_are_no_file(config: TrainConfig) -> None:
    path = Path(str(config.run.dir)) / "metrics.jsonl"
    path.unlink(missing_ok=True)
    path.mkdir()
    with pytest.raises(UserError, match=r"metrics.jsonl: can't be read \(Is a directory\); remove it"):
        resume.prepare(config, resume.decide(config))


def test_checkpoints_on_another_device(config: TrainConfig, tmp_path: Path) -> None:
    """Through a link: what is damaged is moved aside, and its own are its own."""
    folder = Path(str(config.run.dir))
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        shutil.move(folder / "checkpoints", f"{elsewhere}/there")
        (folder / "checkpoints").symlink_to(f"{elsewhere}/there")
        assert resume.is_own(folder, str(step_folder(config, 1)))
        flip(step_folder(config, 2) / SECOND, 999, 1)
        resume.prepare(config, resume.decide(config))
        assert (folder / "before-1" / "checkpoints" / "step-00000002" / SECOND).exists()
        assert resume.decide(config).load == str(step_folder(config, 1))


def test_a_config_that_is_damaged_is_no_reason_to_lose_checkpoints(config: TrainConfig) -> None:
    path = Path(str(config.run.dir)) / "config.yaml"
    path.write_bytes(b"")
    with pytest.raises(UserError, match="remove that file alone, and the run goes on from them"):
        resume.decide(config)
    path.unlink()
    assert resume.decide(config).step == 2


def test_a_reference_that_has_moved_is_the_same(config: TrainConfig, tmp_path: Path) -> None:
    """Another one is refused, wherever it is."""
    here, moved, other = tmp_path / "here", tmp_path / "moved", tmp_path / "other"
    shutil.copytree(step_folder(config, 1), here)
    shutil.copytree(step_folder(config, 2), other)
    saved = changed(config, {"task.name": "dpo", "task.reference": str(here)})
    manifest = replace(read_manifest(step_folder(config, 2)), data=frozen_hashes(saved))
    here.rename(moved)
    folder = Path(str(config.run.dir))
    resume.refuse_other_run(folder, changed(saved, {"task.reference": str(moved)}), saved, manifest)
    with pytest.raises(UserError, match=f"task.reference {here} -> {other}"):
        resume.refuse_other_run(folder, changed(saved, {"task.reference": str(other)}), saved, manifest)


def test_what_is_in_memory_is_kept_on_disk(config: TrainConfig, tmp_path: Path) -> None:
    """Where it has done more steps; it is then gone on from, to the bit."""
    folder, memory = Path(str(config.run.dir)), Copies(tmp_path / "memory")
    (memory.folder / "checkpoints").mkdir(parents=True)
    shutil.copytree(step_folder(config, 1), memory.folder / "checkpoints" / "step-00000001")
    assert resume.keep_copy(folder, memory) is None
    shutil.move(step_folder(config, 2), memory.folder / "checkpoints" / "step-00000002")
    assert resume.keep_copy(folder, memory) == step_folder(config, 2)
    assert resume.decide(config).load == str(step_folder(config, 2))
    for path in (memory.folder / "checkpoints" / "step-00000002").iterdir():
        assert path.read_bytes() == (step_folder(config, 2) / path.name).read_bytes()


def test_what_is_damaged_is_moved_aside(config: TrainConfig) -> None:
    """It is kept, and never the newest again, also once `latest` is gone."""
    flip(step_folder(config, 2) / SECOND, 999, 1)
    start = resume.decide(config)
    resume.prepare(config, start)
    folder = Path(str(config.run.dir))
    assert (folder / "before-1" / "checkpoints" / "step-00000002" / SECOND).exists()
    assert (folder / "checkpoints" / "latest").read_text() == "step-00000001\n"
    again = resume.decide(config)
    assert (again.way, again.load) == ("on", str(step_folder(config, 1)))
    (folder / "checkpoints" / "latest").unlink()
    assert find_checkpoint(folder) == step_folder(config, 1)


@pytest.mark.parametrize("damage", ["flip", "no manifest"])
def test_never_initial_values(config: TrainConfig, damage: str) -> None:
    for step in (1, 2):
        if damage == "flip":
            flip(step_folder(config, step) / FIRST, 2000, 4)
        else:
            (step_folder(config, step) / MANIFEST).unlink()
    with pytest.raises(ConfigError, match="has no whole checkpoint to go on from") as caught:
        resume.decide(config)
    named = step_folder(config, 2) / (FIRST if damage == "flip" else MANIFEST)
    assert str(named) in str(caught.value) and "\n" not in str(caught.value)


def test_unchanged_files_are_hashed_once_for_a_start(config: TrainConfig) -> None:
    """A start is decided twice, without and with the directory's lock."""
    hashed: list[str] = []
    with mock.patch.object(format, "hash_of", counting(hashed)):
        resume.decide(config)
        resume.decide(config)
        assert sorted(hashed) == [FIRST, SECOND]
        (step_folder(config, 2) / FIRST).touch()
        resume.decide(config)
    assert len(hashed) == 4


def counting(hashed: list[str]) -> Callable[[BufferedReader], str]:
    """`hash_of`, which adds the names of the files."""
    real = format.hash_of

    def hash_of(file: BufferedReader) -> str:
        hashed.append(Path(os.readlink(f"/proc/self/fd/{file.fileno()}")).name)
        return real(file)

    return hash_of


def read_counting(rank: int, world_size: int, config: TrainConfig, folder: str) -> tuple[list[str], int, int]:
    """(files hashed by this rank, bytes of tensors that it has read, bytes of its own state in the files' dtype)"""
    trainer = Trainer(config, rank)
    hashed: list[str] = []
    readers: list[CheckpointReader] = []

    plain = CheckpointReader.__init__

    def kept(reader: CheckpointReader, *given: Any) -> None:
        plain(reader, *given)
        readers.append(reader)

    with mock.patch.object(format, "hash_of", counting(hashed)), mock.patch.object(CheckpointReader, "__init__", kept):
        load(folder, trainer.optimizer, config)
    own = sum(
        values.numel()
        for one in owned_boxes(trainer.buffers)
        for parts in trainer.optimizer.state().values()
        if (values := one.part_of(parts)) is not None
    )
    trainer.close()
    return hashed, sum(reader.bytes_read for reader in readers), own * 8


@pytest.mark.parametrize(
    ("source", "targets"),
    [
        (("tp2dp2", {"parallel.zero": 1}), [("pp2", {}), ("tp2pp2", {}), ("dp4", {"parallel.zero": 1})]),
        (("single", {}), [("tp4", {}), ("dp2", {"parallel.zero": 1})]),
    ],
    ids=["tp2dp2", "single"],
)
def test_each_file_is_hashed_once_and_no_rank_reads_more_than_its_shard(
    pool: WorkerPool, tokens: str, tmp_path: Path, source: tuple[str, dict], targets: list[tuple[str, dict]]
) -> None:
    written = tiny_config(tokens, source[0], **source[1])
    pool.run(jobs.run, written.parallel.layout.world, written, 1, None, str(tmp_path))
    files = sorted(read_manifest(tmp_path / "step-00000001").files)
    for layout, values in targets:
        config = tiny_config(tokens, layout, **values)
        found = pool.run(read_counting, config.parallel.layout.world, config, str(tmp_path))
        assert sorted(name for hashed, _, _ in found for name in hashed) == files, layout
        for rank, (hashed, read, own) in enumerate(found):
            assert len(hashed) <= -(-len(files) // len(found)), (layout, rank)
            assert own <= read <= 1.1 * own, (layout, rank)


def test_one_rank_hashes_a_file_and_all_refuse_it(pool: WorkerPool, config: TrainConfig) -> None:
    """Also those that would read nothing of it."""
    flip(step_folder(config, 2) / SECOND, 500, 2)
    lines = pool.run(jobs.refused, 4, changed(config, {"parallel.pp": 2}), str(step_folder(config, 2)))
    assert len(set(lines)) == 1 and lines[0].startswith(f"{step_folder(config, 2) / SECOND}: changed")
