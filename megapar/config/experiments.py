"""Folders of experiments: `experiments/NAME/` of the current folder, and of the checkout that megapar runs from."""

from pathlib import Path

import megapar


def experiment_folders() -> dict[str, Path]:
    """Where experiments may be, by what a message calls that folder."""
    folders = {"experiments/": Path("experiments")}
    checkout = Path(megapar.__file__).parents[1]
    if (checkout / "pyproject.toml").exists() and checkout != Path.cwd().resolve():
        folders[f"{checkout}/experiments/"] = checkout / "experiments"
    return folders


def experiment_files(name: str) -> dict[str, list[Path]]:
    """The files of that name in the folders of experiments, by the experiment."""
    found: dict[str, list[Path]] = {}
    for folder in experiment_folders().values():
        for path in sorted(folder.glob(f"*/{name}")):
            found.setdefault(path.parent.name, []).append(path)
    return found
