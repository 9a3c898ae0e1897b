"""Old checkpoints are removed: whole, and never the one that `latest` names."""

import shutil
from pathlib import Path

import pytest

from megapar.checkpoint import keep_newest, save
from megapar.train.trainer import Trainer
from tests.tiny import tiny_config


def step_folders(folder: Path, steps: range) -> None:
    for step in steps:
        (folder / f"step-{step:08d}").mkdir()
        (folder / f"step-{step:08d}" / "manifest.json").touch()


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
