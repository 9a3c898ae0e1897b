"""Folders of experiments: `experiments/NAME/` of the current folder, and of the checkout that megapar runs from."""

from pathlib import Path

import megapar


def experiment_folders() -> list[Path]:
    """The folders `experiments/` that there are, the current folder's first."""
    folders = [Path("experiments"), Path(megapar.__file__).resolve().parent.parent / "experiments"]
    return [folder for folder in folders if folder.is_dir()]


def experiment_files(name: str) -> dict[str, Path]:
    """The file of that name in each experiment that has one, by the experiment; the current folder's come first."""
    found: dict[str, Path] = {}
    for folder in experiment_folders():
        for path in sorted(folder.glob(f"*/{name}")):
            found.setdefault(path.parent.name, path)
    return found
