"""Old checkpoints are removed: whole, and never the one that `latest` names."""

import shutil
from pathlib import Path

import pytest
import torch

from megapar.checkpoint import Manifest, keep_newest, save
from megapar.checkpoint.format import StoredBox, StoredParameter, manifest_text
from megapar.checkpoint.hf.write import Entry, write_tensors
from megapar.parallel.boxes import Box
from megapar.train.trainer import Trainer
from tests.tiny import tiny_config

FILE = "rank-00000.safetensors"


def step_folders(folder: Path, steps: range) -> None:
    """Checkpoints of a model of one element."""
    for step in steps:
        path = folder / f"step-{step:08d}"
        path.mkdir()
        facts = write_tensors(path / FILE, [Entry("weight/a/0", (1,), "F32")], iter([torch.ones(1)]), {})
        boxes = [StoredBox(FILE, Box((0,), (1,)))]
        manifest = Manifest(
            step=step,
            optimizer_steps=step,
            samples=step,
            seed=1,
            layout="single",
            config={},
            environment={},
            kinds={"weight": "F32"},
            parameters={"a": StoredParameter((1,), boxes)},
            files={FILE: facts},
        )
        (path / "manifest.json").write_text(manifest_text(manifest))


def left(folder: Path) -> list[int | str]:
    return [int(path.name[5:]) if path.name[5:].isdigit() else path.name for path in sorted(folder.glob("step-*"))]


@pytest.mark.parametrize(("latest", "expected"), [(5, [4, 5]), (1, [1, 4, 5]), (None, [4, 5])])
def test_the_newest_stay_and_the_latest(latest: int | None, expected: list[int], tmp_path: Path) -> None:
    step_folders(tmp_path, range(1, 6))
    (tmp_path / "step-00000002" / "manifest.json").unlink()  # not ours to count, nor to remove
    if latest is not None:
        (tmp_path / "latest").write_text(f"step-{latest:08d}\n")
    assert keep_newest(tmp_path, 2) == []
    assert [step for step in left(tmp_path) if step != 2] == expected


@pytest.mark.parametrize("damaged", ["rank-00000.safetensors", "manifest.json"])
def test_what_is_damaged_does_not_count_and_stays(damaged: str, tmp_path: Path) -> None:
    """Else the last whole one would go, for two that are not."""
    step_folders(tmp_path, range(1, 5))
    for step in (3, 4):
        (tmp_path / f"step-{step:08d}" / damaged).write_bytes(b"half of it")
    (tmp_path / "latest").write_text("step-00000004\n")
    assert keep_newest(tmp_path, 1) == []
    assert left(tmp_path) == [2, 3, 4]


def test_what_a_crash_leaves_has_no_name_and_is_swept(
    tokens: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(path: Path) -> None:
        (path / "manifest.json").unlink()
        raise OSError(5, "Input/output error")

    step_folders(tmp_path, range(1, 3))
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", crash)
        (said,) = keep_newest(tmp_path, 1)
    assert (
        said == f"checkpoint.keep=1: {tmp_path}/step-00000001 can't be removed (Input/output error); remove it by hand"
    )
    names = left(tmp_path)
    assert len(names) == 2 and 1 not in names and 2 in names
    trainer = Trainer(tiny_config(tokens), 0)
    save(tmp_path, trainer.optimizer, trainer.config, 3)
    assert left(tmp_path) == [2, 3]
