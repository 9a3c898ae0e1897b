"""Damaged, foreign and unfinished checkpoints: one line that names the file, and what was good before stays usable."""

import hashlib
import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from megapar.checkpoint import find_checkpoint, load, read_manifest, save
from megapar.checkpoint.format import _overlap, manifest_text
from megapar.config.errors import UserError
from megapar.launch.pool import PoolError, WorkerPool
from megapar.parallel.boxes import Box
from megapar.train.trainer import Trainer
from tests.checkpoint import jobs
from tests.tiny import tiny_config


@pytest.fixture(scope="module")
def written(pool: WorkerPool, tokens: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of checkpoints with one of two files."""
    folder = tmp_path_factory.mktemp("written")
    pool.run(jobs.run, 2, tiny_config(tokens, "tp2"), 2, None, str(folder))
    return folder


@pytest.fixture
def step(written: Path, tmp_path: Path) -> Path:
    """A step folder to damage."""
    return shutil.copytree(written, tmp_path / "checkpoints") / "step-00000002"


@pytest.fixture(scope="module")
def trainer(tokens: str) -> Trainer:
    return Trainer(tiny_config(tokens), 0)


def refusal(trainer: Trainer, path: Path, **values: Any) -> str:
    config = tiny_config(trainer.config.data.path, **values) if values else trainer.config
    with pytest.raises(UserError) as caught:
        load(path, trainer.optimizer, config)
    line = str(caught.value)
    assert "\n" not in line
    return line


FIRST, SECOND, MANIFEST = "rank-00000.safetensors", "rank-00001.safetensors", "manifest.json"


@pytest.mark.parametrize("name", [FIRST, SECOND, MANIFEST])
@pytest.mark.parametrize("length", [0, 0.5, -1])
def test_truncated(trainer: Trainer, step: Path, name: str, length: float) -> None:
    size = (step / name).stat().st_size
    os.truncate(step / name, int(size * length) if length >= 0 else size - 1)
    line = refusal(trainer, step)
    assert str(step / name) in line
    assert "use another checkpoint" in line


def test_every_flipped_bit_is_seen(trainer: Trainer, step: Path) -> None:
    random = np.random.default_rng(0)
    for name in (FIRST, SECOND, MANIFEST):
        good = (step / name).read_bytes()
        for offset in [0, 11, 80, len(good) - 1, *random.integers(0, len(good), 12)]:
            bad = bytearray(good)
            bad[offset] ^= 1 << random.integers(8)
            (step / name).write_bytes(bad)
            assert str(step / name) in refusal(trainer, step), f"byte {offset}"
        (step / name).write_bytes(good)
    assert load(step, trainer.optimizer, trainer.config).step == 2


@pytest.mark.parametrize("name", [FIRST, SECOND, MANIFEST])
def test_missing(trainer: Trainer, step: Path, name: str) -> None:
    (step / name).unlink()
    line = refusal(trainer, step)
    assert f"{step / name}: missing" in line


def test_swapped_files(trainer: Trainer, step: Path) -> None:
    (step / FIRST).rename(step / "x")
    (step / SECOND).rename(step / FIRST)
    (step / "x").rename(step / SECOND)
    assert f"{step / FIRST}: " in refusal(trainer, step)


def test_manifest_of_another_checkpoint(
    trainer: Trainer, step: Path, pool: WorkerPool, tokens: str, tmp_path: Path
) -> None:
    pool.run(jobs.run, 2, tiny_config(tokens, "tp2"), 1, None, str(tmp_path / "other"))
    shutil.copy(tmp_path / "other" / "step-00000001" / MANIFEST, step / MANIFEST)
    assert f"{step / MANIFEST}: is of step 1, so it was moved" in refusal(trainer, step)
    rewrite(step, set_value("step", 2))
    assert f"{step / FIRST}: changed" in refusal(trainer, step)


def test_link_out_of_the_folder(trainer: Trainer, step: Path, tmp_path: Path) -> None:
    shutil.move(step / FIRST, tmp_path / FIRST)
    (step / FIRST).symlink_to(tmp_path / FIRST)
    assert f"{step / FIRST}: can't be read" in refusal(trainer, step)


def rewrite(step: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest as somebody would who knows the format: the hash in the first line is right."""
    body = json.loads((step / MANIFEST).read_text())
    del body["sha256"]
    change(body)
    rest = json.dumps(body)[1:]
    (step / MANIFEST).write_text(f'{{"sha256": "{hashlib.sha256(rest.encode()).hexdigest()}",\n{rest}')


@pytest.mark.parametrize("name", ["../rank-00000.safetensors", "/etc/passwd", "a/rank-00000.safetensors", "x.pkl", "."])
def test_file_names_that_lead_out(trainer: Trainer, step: Path, name: str) -> None:
    def change(body: dict[str, Any]) -> None:
        body["files"][name] = body["files"].pop(FIRST)
        for parameter in body["parameters"].values():
            parameter["boxes"] = [[name if file == FIRST else file, *box] for file, *box in parameter["boxes"]]

    rewrite(step, change)
    assert f"{step / MANIFEST}: not a valid manifest" in refusal(trainer, step)


def set_value(*path: Any) -> Callable[[dict[str, Any]], None]:
    """Set the value at body[path[0]][path[1]]..., the last of `path`."""

    def change(body: Any) -> None:
        *way, last, value = path
        for key in way:
            body = body[key]
        body[last] = value

    return change


NORM = ("parameters", "norm.weight")


def huge(body: dict[str, Any]) -> None:
    """A shape of 10^15 elements that fits in itself."""
    ((file, _, _),) = body["parameters"]["norm.weight"]["boxes"]
    body["parameters"]["norm.weight"] = {"shape": [10**15], "boxes": [[file, [0], [10**15]]]}


def twice_and_never(body: dict[str, Any]) -> None:
    """Two boxes of the right number of elements, which leave a hole."""
    ((file, _, (size,)),) = body["parameters"]["norm.weight"]["boxes"]
    body["parameters"]["norm.weight"]["boxes"] = [[file, [0], [size // 2]]] * 2


def renamed(name: str) -> Callable[[dict[str, Any]], None]:
    def change(body: dict[str, Any]) -> None:
        body["parameters"][name] = body["parameters"].pop("norm.weight")

    return change


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (set_value("version", 2), "version 2"),
        (set_value("format", "other"), "format other"),
        (set_value(*NORM, "shape", [10**15]), "not a valid manifest"),
        (set_value(*NORM, "boxes", []), "not a valid manifest"),
        (set_value(*NORM, "boxes", 0, 1, [-1]), "not a valid manifest"),
        (set_value(*NORM, "boxes", 0, 0, SECOND), "norm.weight"),
        (set_value("parameters", []), "not a valid manifest"),
        (set_value("kinds", {"weight": "F64"}), "holds no exp_avg"),
        (set_value("kinds", "exp_avg", "F32"), "another shape or dtype"),
        (lambda body: body["parameters"].pop("norm.weight"), "has no parameter norm.weight"),
        (lambda body: body["parameters"].update(more=body["parameters"]["norm.weight"]), "has no parameter more"),
        (lambda body: body.pop("step"), "not a valid manifest"),
        (huge, "can't hold"),
        (twice_and_never, "the parts of norm.weight are not its whole"),
        (renamed("norm\0.weight"), "is no name"),
        (renamed("norm\n.weight"), "is no name"),
        (set_value(*NORM, "shape", [16.0]), "are no whole numbers"),
        (set_value("kinds", "weight", "O"), "no known dtype"),
        (set_value("carried", {"weight": {}}), "weights are parameters"),
        (set_value("carried", {"factors": {"a": {"shape": [10**15], "boxes": []}}}), "are not its whole"),
        (set_value("carried", {"exp_avg": {}}), "holds no exp_avg of"),
        (set_value(*NORM, {"shape": [0], "boxes": []}), "norm.weight has no values"),
        (set_value("step", float("inf")), "not a valid manifest"),
        (set_value("step", -1), "step is no number"),
        (set_value("step", 2.5), "step is no number"),
        (set_value("step", "2"), "step is no number"),
        (set_value("optimizer_steps", 10**40), "optimizer_steps is no number"),
        (set_value("tokens", -5), "tokens is no number"),
        (set_value("config", {"model": None}), "config.model is no group"),
        (set_value("config", "train", 5), "config.train is no group"),
        (set_value("config", []), "not a valid manifest"),
        (set_value("data", {"tokens": 5}), "not a valid manifest"),
        (set_value("layout", "\x1b[2Jtp2"), "not a valid manifest"),
        (set_value("environment", "torch", "\x1b]0;2"), "not a valid manifest"),
    ],
)
def test_manifest_that_fits_nothing(trainer: Trainer, step: Path, change: Any, expected: str) -> None:
    rewrite(step, change)
    assert expected in refusal(trainer, step)


def test_a_renamed_step_is_not_what_its_name_says(trainer: Trainer, step: Path) -> None:
    """Nor are two that have changed places; under another name than a step's it may be kept."""
    shutil.copytree(step, step.parent / "step-00000009")
    line = refusal(trainer, step.parent)
    assert line.startswith(
        f"{step.parent}/step-00000009/{MANIFEST}: is of step 2, so it was moved, or its folder renamed"
    )
    shutil.copytree(step, step.parent / "the best")
    assert load(step.parent / "the best", trainer.optimizer, trainer.config).step == 2


def test_names_that_are_there_twice(trainer: Trainer, step: Path) -> None:
    """A reader would see one of them, a checker the other."""
    text = (step / MANIFEST).read_text().partition("\n")[2]
    twice = text.replace('"parameters": {', '"parameters": {"norm.weight": {"shape": [1], "boxes": []}, ', 1)
    digest = hashlib.sha256(twice.encode()).hexdigest()
    (step / MANIFEST).write_text(f'{{"sha256": "{digest}",\n{twice}')
    assert "'norm.weight' is there twice" in refusal(trainer, step)


@pytest.mark.parametrize("name", [FIRST, MANIFEST])
@pytest.mark.parametrize("kind", ["fifo", "folder"])
def test_what_is_no_file_is_not_waited_for(trainer: Trainer, step: Path, name: str, kind: str) -> None:
    (step / name).unlink()
    os.mkfifo(step / name) if kind == "fifo" else (step / name).mkdir()
    assert f"{step / name}: can't be read (" in refusal(trainer, step)


def test_latest_that_is_no_file_is_not_waited_for(trainer: Trainer, step: Path) -> None:
    (step.parent / "latest").unlink()
    os.mkfifo(step.parent / "latest")
    assert load(step.parent, trainer.optimizer, trainer.config).step == 2


def test_little_memory_for_what_is_refused(trainer: Trainer, step: Path) -> None:
    rewrite(step, huge)
    tracemalloc.start()
    try:
        refusal(trainer, step)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


def test_file_with_another_tensor(trainer: Trainer, step: Path) -> None:
    """Hashes can be right where the content is not."""
    tensors = load_file(step / FIRST)
    tensors["weight/norm.weight/0"] = tensors["weight/norm.weight/0"][:3]
    save_file(tensors, step / FIRST)
    facts = {"size": (step / FIRST).stat().st_size, "sha256": hashlib.sha256((step / FIRST).read_bytes()).hexdigest()}
    rewrite(step, set_value("files", FIRST, facts))
    line = refusal(trainer, step)
    assert str(step / FIRST) in line
    assert "weight of norm.weight: another shape or dtype" in line


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"model.hidden": 32}, "model.hidden=32: "),
        ({"model.rope_theta": 500.0}, "use model.rope_theta=10000.0"),
        ({"train.seed": 5}, "use train.seed=1234"),
        ({"train.global_batch_size": 16}, "use train.global_batch_size=8"),
        ({"data.split": 0.1}, "use data.split=0.05"),
    ],
)
def test_other_model_or_data_order(trainer: Trainer, step: Path, values: dict[str, Any], expected: str) -> None:
    assert expected in refusal(trainer, step, **values)


def test_other_tokens(trainer: Trainer, written: Path, step: Path, tmp_path: Path, tokens: str) -> None:
    prefix = tmp_path / "tokens"
    for ending in (".bin", ".idx"):
        shutil.copy(f"{tokens}{ending}", f"{prefix}{ending}")
    prefix.with_suffix(".json").write_text(json.dumps({"files": {".bin": {"sha256": "0" * 64}}}))
    rewrite(step, set_value("data", {"tokens": "1" * 64}))
    config = tiny_config(str(prefix))
    with pytest.raises(UserError, match="not the tokens that"):
        load(step, trainer.optimizer, config)


def test_paths(trainer: Trainer, written: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(written, run_dir / "checkpoints")
    for path in (run_dir, run_dir / "checkpoints", run_dir / "checkpoints" / "step-00000002"):
        assert load(path, trainer.optimizer, trainer.config).folder == run_dir / "checkpoints" / "step-00000002"
    assert "no such folder" in refusal(trainer, tmp_path / "nothing")
    assert "holds no checkpoint" in refusal(trainer, tmp_path)
    unfinished = run_dir / "checkpoints" / "step-00000004.tmp-0123abcd"
    shutil.copytree(run_dir / "checkpoints" / "step-00000002", unfinished)
    assert "unfinished" in refusal(trainer, unfinished)
    assert load(run_dir, trainer.optimizer, trainer.config).step == 2
    assert load(run_dir / "checkpoints" / "latest", trainer.optimizer, trainer.config).step == 2
    assert "missing, so this is no complete checkpoint" in refusal(trainer, run_dir / "checkpoints" / "step-00000009")


@pytest.mark.parametrize("name", ["exp.tmp-1", "step-00000007", "step-00000007.tmp-0a", "latest", "checkpoints"])
def test_a_run_may_be_named_like_a_checkpoint(trainer: Trainer, written: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(written, tmp_path / name / "checkpoints")
    assert load(tmp_path / name, trainer.optimizer, trainer.config).step == 2


@pytest.mark.parametrize("latest", [None, "", "step-00000009", "../step-00000001", "\udcff garbage"])
def test_latest_that_names_nothing(trainer: Trainer, step: Path, latest: str | None) -> None:
    """The newest finished step is taken."""
    pointer = step.parent / "latest"
    pointer.unlink() if latest is None else pointer.write_bytes(latest.encode("utf-8", "surrogateescape"))
    (step.parent / "step-00000001").mkdir()
    assert load(step.parent, trainer.optimizer, trainer.config).step == 2


def test_a_stale_latest_is_no_reason_to_take_an_earlier_step(trainer: Trainer, step: Path) -> None:
    """A run may have ended between the name of a checkpoint and `latest`, which counts only where it is asked for."""
    shutil.copytree(step, step.parent / "step-00000003")
    rewrite(step.parent / "step-00000003", set_value("step", 3))
    assert (step.parent / "latest").read_text() == "step-00000002\n"
    assert find_checkpoint(step.parent).name == "step-00000003"
    assert find_checkpoint(step.parent / "latest") == step


def test_every_rank_refuses_alike(pool: WorkerPool, tokens: str, step: Path) -> None:
    """Only one rank reads the damaged file of its own part; the other must not go on alone."""
    data = bytearray((step / SECOND).read_bytes())
    data[-1] ^= 1
    (step / SECOND).write_bytes(data)
    lines = pool.run(jobs.refused, 2, tiny_config(tokens, "tp2"), str(step))
    assert lines[0] == lines[1]
    assert f"{step / SECOND}: changed" in lines[0]


@pytest.mark.parametrize("rank_at_fault", [0, 1])
def test_full_disk(pool: WorkerPool, tokens: str, step: Path, trainer: Trainer, rank_at_fault: int) -> None:
    folder = step.parent
    before = sorted(folder.rglob("*"))
    lines = pool.run(jobs.save_with_full_disk, 2, tiny_config(tokens, "tp2"), str(folder), rank_at_fault)
    assert lines[0] == lines[1]
    assert lines[0].startswith(str(folder))
    assert f"rank-0000{rank_at_fault}.safetensors: the checkpoint can't be written (" in lines[0]
    assert "\n" not in lines[0]
    assert sorted(folder.rglob("*")) == before
    assert load(folder, trainer.optimizer, trainer.config).step == 2


def test_folder_that_can_not_be_made(trainer: Trainer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't be written"):
        save(tmp_path / "file" / "checkpoints", trainer.optimizer, trainer.config, 1)


def test_death_before_the_rename(pool: WorkerPool, tokens: str, step: Path, trainer: Trainer) -> None:
    """The former checkpoint is the newest; the next save sweeps what was left behind."""
    folder = step.parent
    with pytest.raises(PoolError):
        pool.run(jobs.die_before_rename, 2, tiny_config(tokens, "tp2"), str(folder))
    left_over = list(folder.glob("step-00000004.tmp-*"))
    assert len(left_over) == 1
    assert load(folder, trainer.optimizer, trainer.config).step == 2
    assert save(folder, trainer.optimizer, trainer.config, 3) == folder / "step-00000003"
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-00000002", "step-00000003"]
    assert load(folder, trainer.optimizer, trainer.config).step == 3


def test_same_step_again(trainer: Trainer, tmp_path: Path) -> None:
    """A run that comes by a second time replaces the checkpoint of the first."""
    for steps in (1, 2):
        trainer.optimizer.steps = steps
        save(tmp_path, trainer.optimizer, trainer.config, 1)
        assert read_manifest(tmp_path / "step-00000001").optimizer_steps == steps
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]


def test_nothing_is_pickled(step: Path) -> None:
    for path in step.iterdir():
        if path.name == MANIFEST:
            json.loads(path.read_text())
        else:
            with safe_open(path, framework="np") as file:
                assert all(key.count("/") == 2 for key in file.keys())  # noqa: SIM118 (no dict)
    manifest = read_manifest(step)
    assert manifest_text(manifest) == (step / MANIFEST).read_text()


@pytest.mark.parametrize("dim", [0, 1])
def test_many_boxes_of_a_stranger_take_no_time(dim: int) -> None:
    """They are compared with their neighbours alone, whichever dim tells them apart."""
    boxes = [Box(tuple(4 * number * (one == dim) for one in (0, 1)), (4, 4)) for number in range(500)]
    with mock.patch.object(Box, "overlap", autospec=True, side_effect=Box.overlap) as compared:
        assert not _overlap(boxes)
    assert compared.call_count < len(boxes)
    assert _overlap([*boxes, boxes[7]])
