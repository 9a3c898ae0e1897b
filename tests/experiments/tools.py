"""What the tests of experiments with images and sounds share."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from experiments.shards import SPLITS, Sample, read_shards


def digest(folder: Path) -> str:
    """Of names and contents of all files in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    found = hashlib.sha256()
    for path in files:
        found.update(f"{path.relative_to(folder)} {path.stat().st_size} ".encode() + path.read_bytes())
    return found.hexdigest()


def built(build: Callable[[Path, int], None], folder: Path) -> tuple[list[Sample], list[Sample]]:
    """Train and valid of seed 1. Asserts that it is the same when it is made again, and not with another seed."""
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        (folder / name).mkdir()
        build(folder / name, seed)
    assert digest(folder / "one") == digest(folder / "same") != digest(folder / "other")
    train, valid = (list(read_shards(folder / "one" / split)) for split in SPLITS)
    return train, valid


def texts(samples: list[Sample], ending: str) -> list[str]:
    return [sample[ending].decode() for sample in samples]
